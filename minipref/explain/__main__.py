"""`python -m minipref.explain`: the page and the figure of one pair, or with --serve the live page."""

import argparse
import sys
from pathlib import Path

from minipref.checkpoint import load_classifier
from minipref.config import LABELS
from minipref.data import read_pairs, to_pairs
from minipref.explain.attribution import explain
from minipref.explain.figure import STYLE, figure
from minipref.explain.page import PAGE_MARK, page
from minipref.explain.serve import EXAMPLES, Server
from minipref.predictor import (
    SETTINGS,
    Judge,
    add_rows_or_pair,
    check_rows_or_pair,
    check_vocabulary,
    load_judge,
    refuse_other_task,
)
from minipref.run.folder import newest_models
from minipref.run.state import keep_globals
from minipref.runtime import (
    ArgumentParser,
    InputError,
    check_replaceable,
    check_writable,
    number,
    run_program,
    write_text,
)
from minipref.tokenizer import load_tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "weights" / "minipref-tiny"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m minipref.explain", description="What each head attends to, and token "
                            "attributions of a prediction: a page and a figure, or with --serve a live page.")
    add = parser.add_argument
    add_rows_or_pair(parser)
    add("--row", type=number(int, 1), metavar="N", help="which row of the CSV, counted from 1 (default: the first)")
    add("--model", metavar="DIR", help="a trained model or an encoder (default: the newest run's, or the bundled)")
    add("--layer", type=int, default=1, metavar="N", help="the layer to open with, counted from 1")
    add("--head", type=int, default=1, metavar="N", help="the head to open with, counted from 1")
    add("--tokens", type=int, default=128, metavar="N",
        help="truncate the pair to this many tokens: the page grows with their square")
    add("--output", metavar="HTML", help="the page (default: explain.html); the figure goes beside it")
    add("--serve", action="store_true",
        help="serve the live page to this machine's browser until Ctrl-C: type a pair, or choose a row of the CSV")
    add("--port", type=number(int, 0, 65535), default=0, metavar="N", help="with --serve (default: a free port)")
    options = parser.parse_args(arguments)
    if options.row is not None and options.csv is None:
        parser.error("--row without a CSV")
    options.row = options.row or 1
    if options.serve and options.output is not None:
        parser.error("both --serve and --output")
    if not options.serve or any(text is not None for text in (options.prompt, options.a, options.b)):
        check_rows_or_pair(parser, options)
    options.output = options.output or "explain.html"
    if not options.output.endswith(".html"):
        parser.error(f"--output {options.output}: the page's name ends in .html")
    return options


def main(arguments: list[str] | None = None) -> int:
    return run_program("explain", lambda: run(parse_arguments(arguments)))


@keep_globals()
def run(options: argparse.Namespace) -> None:
    output, drawing = Path(options.output), Path(options.output).with_suffix(".svg")
    for path, mark in ((output, PAGE_MARK), (drawing, f"<style>{STYLE}")) if not options.serve else ():
        check_writable(path, filter(None, (options.csv, options.model)))
        check_replaceable(path, mark, "one of minipref.explain")
    pairs, pair = [], None
    if options.csv is not None:
        pairs = read_pairs(options.csv, "if present")
        if options.row > len(pairs):
            raise InputError(file=options.csv, found=f"no row {options.row}", expected=f"a row of the {len(pairs):,}")
        pair = pairs[options.row - 1]
    elif options.prompt is not None:
        [pair] = to_pairs([(options.prompt, options.a, options.b)])
    judge, name = load_model(options.model)
    config = judge.model.config
    for what, chosen, count in (("layer", options.layer, config.num_hidden_layers),
                                ("head", options.head, config.num_attention_heads)):
        if not 1 <= chosen <= count:
            raise InputError(found=f"--{what} {chosen}", expected=f"from 1 to {count} with this model")
    layer, head = options.layer - 1, options.head - 1
    print(f"model      {name}")
    if judge.model.load_report.note:
        print(f"           {judge.model.load_report.note}")
    if judge.model.load_report.new:
        print("           no trained classifier here, so no prediction: train.py trains one")
    if options.serve:
        with Server(judge, name, pairs, pair, max_length=options.tokens, layer=layer, head=head,
                    port=options.port) as server:
            server.explain(EXAMPLES[0][1])                  # an invalid --tokens fails before serving starts
            print(f"serving    {server.address}   (for browsers on this machine; Ctrl-C stops it)", flush=True)
            server.run()
        print("stopped")
        return
    explanation = explain(judge, pair, options.tokens, name)
    write_text(output, page(explanation, layer, head))
    write_text(drawing, figure(explanation, layer, head))
    print(f"explained  {len(explanation.tokens)} tokens, {explanation.num_truncated:,} left out")
    if explanation.attribution is not None:
        for label, p in zip(LABELS, explanation.attribution.averaged):
            print(f"           {label:<4} {p:.4f}")
    print(f"wrote      {output} and {drawing}")


def load_model(path: str | None) -> tuple[Judge, str]:
    """The model at `path`, else the newest run's (its first fold's), else the bundled encoder; and its name."""
    try:
        folder = Path(path) if path else newest_models()[0]
    except InputError as problem:                                        # nothing was trained yet
        folder = BUNDLED
        if not folder.is_dir():
            raise InputError(found=f"{problem.found}, and an installed minipref has no bundled encoder",
                             expected="--model DIR: a run's model/, or an encoder like weights/minipref-tiny of the "
                                      "repository") from None
    name = "/".join(folder.resolve().parts[-2:])
    if (folder / SETTINGS).exists():
        return load_judge(folder, fast=False), name
    tokenizer, model = load_tokenizer(folder), load_classifier(folder)
    refuse_other_task(model, folder)
    check_vocabulary(tokenizer, model.config.vocab_size, folder)
    return (Judge(model, tokenizer, model.config.max_distance),
            f"{name}, an encoder" if model.load_report.new else name)


if __name__ == "__main__":
    sys.exit(main())
