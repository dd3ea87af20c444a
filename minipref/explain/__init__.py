"""What one head attends to, split into its three terms, and which tokens a prediction depends on.

    python -m minipref.explain --prompt "Name a fruit." --a "An apple." --b "A chair."
    python -m minipref.explain data/train.csv --row 3 --model runs/first/model --output row3.html
    python -m minipref.explain --serve

The first two write a page, one HTML file that needs no server and fetches nothing, and a figure beside it with the same
name, .svg. The third serves the same page to a browser on this machine, and explains what is typed into it.
Without --model it uses the newest run's model, else the bundled encoder, which has no trained classifier: the page
then shows its attention and no prediction.

What is unusual here:
- The mean of each row of scores is subtracted. Adding a number to all of a query's scores changes no probability, and
  in trained heads that number is often larger than the differences that matter.
- The pair is predicted in both orders. A token that matters in one order only shows position bias.
- The forward pass is the model's own: hooks keep the input of each attention layer.

    attribution.py   the forward pass, watched, and the attributions
    figure.py        one head as an SVG
    page.py          everything as an HTML page: page.html, its style, and page.js, its script
    serve.py         the live page's server
"""

import minipref.threads  # noqa: F401 - before torch
from minipref.explain.attribution import Attribution, Explanation, explain
from minipref.explain.figure import figure
from minipref.explain.page import page

__all__ = ["Attribution", "Explanation", "explain", "figure", "page"]
