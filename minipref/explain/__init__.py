"""What one head attends to, split into its three terms, and which tokens a prediction depends on.

    python -m minipref.explain --prompt "Name a fruit." --a "An apple." --b "A chair."
    python -m minipref.explain data/train.csv --row 3 --model runs/first/model --output row3.html

Writes a page, one HTML file that needs no server and fetches nothing, and a figure beside it, the same name with .svg.
Without --model it uses the newest run's model, else the bundled encoder, which has no trained classifier: the page
then shows its attention and no prediction.

What is unusual here:
- Scores are shown less their row's mean. Adding a number to all of a query's scores changes no probability, and in
  trained heads that number is often larger than the differences that matter.
- The swap check. The pair is predicted in both orders; a token that matters in one order only shows position bias.

    attribution.py   the forward pass with its scores, and the attributions
    figure.py        one head as an SVG
    page.py          everything as an HTML page
"""

from minipref.explain.attribution import Attribution, Explanation, explain
from minipref.explain.figure import figure
from minipref.explain.page import page

__all__ = ["Attribution", "Explanation", "explain", "figure", "page"]
