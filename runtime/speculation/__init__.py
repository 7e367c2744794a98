"""Speculation: several tokens are guessed ahead, and one step checks them all.

A guess that the model would have chosen itself is kept, and what follows the first wrong one is rolled back. So the
answer is the ordinary one; only the number of steps is smaller. How a token is chosen does not depend on the guess:
from the logits after the tokens before it, with the request's own sampling, draws, biases and constraint. For guesses
that are certain, as these are, that is the rejection sampling of Leviathan et al. (arXiv 2211.17192): a guess g is kept
with its probability p(g), and another token is drawn with p(x) otherwise.
"""
