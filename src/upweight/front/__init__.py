"""The front door: from a trained model to scores, with the method chosen from what is known.

`choice.py` is the table of methods and the rule, a pure function. `facts.py` finds out what it
asks for, `opened.py` makes a task of whatever was trained. `attribute.py` answers, `plan.py` says
beforehand.
"""
