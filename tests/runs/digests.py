"""What tells two runs apart: a hash of each file of scores."""

import hashlib


def digests(run):
    """Equal for scores that are equal bit for bit."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.scores.glob("*.safetensors"))
    }
