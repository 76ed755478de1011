"""Where does the model look, where does a training example touch it, and who made it look there?

Three questions of a map a(m, x), which says how much each feature of x has to do with m(x):

    output      a(f_c, x)                        of an output, as everybody does
    score       a(S(·, zᵢ), x) = ∂a(m, x)/∂wᵢ    of the influence score in the test input
                a(S(q, ·), xᵢ)                   of the influence score in the training input
    Mass        m(θ) = Σ_region a(f_c, x)        a measure: S[q, i] says who makes it look there

A score is a derivative along a fixed direction of θ, S(x, i) = d/dε m(x; θ̂ + εu) with
u = −P gᵢ/n (in the training input m = ℓ and u = −P ∇m_q/n). So its map is the central difference of
two ordinary maps, of plain copies of the model at θ̂ ± εu, whatever the method and its hooks are:

    a(S) = [a(m; θ̂ + εu) − a(m; θ̂ − εu)] / 2ε + O(ε²)

For methods that are linear in m (gradients, integrated gradients, SmoothGrad, deletion, LIME, SHAP)
it is the map of the function x ↦ S(x, i); for the others it is how the map itself moves with the
weight of example i. P is that of the fit: nothing is trained on the path from the baseline.
"""

from upweight.applications.attributions import (
    CAM,
    TCAV,
    Additive,
    Attribution,
    Deletion,
    GradCAM,
    Gradient,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
)
from upweight.applications.maps import METHODS, Map, output, score
from upweight.applications.mass import Mass
from upweight.applications.packaged import (
    LIME,
    LRP,
    SHAP,
    Captum,
    Deconvolution,
    DeepLIFT,
    DeepTaylor,
    GuidedBackprop,
)
from upweight.applications.views import Views, views

__all__ = [
    "CAM",
    "LIME",
    "LRP",
    "METHODS",
    "SHAP",
    "TCAV",
    "Additive",
    "Attribution",
    "Captum",
    "Deconvolution",
    "DeepLIFT",
    "DeepTaylor",
    "Deletion",
    "GradCAM",
    "Gradient",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "Map",
    "Mass",
    "Saliency",
    "SmoothGrad",
    "Views",
    "output",
    "score",
    "views",
]
