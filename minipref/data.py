"""From rows to padded batches.

    row      id, prompt, response_a, response_b and, for training, three label columns, from `layouts.py`
    turns    each text cell is a JSON list of turns or, in a file of plain texts, one turn
    segments the token ids of prompt, A and B, each truncated to its share of the budget
    batch    [CLS] prompt [SEP] A [SEP] B [SEP] of rows of similar length, padded to the longest

What is unusual here:
- **Segments are truncated before they are joined**, so a long prompt cannot push response B out of the sequence. A
  segment that is too long keeps its head and its tail: the tail shows whether a response is complete.
- **Swapping A and B is free**: the budget treats both responses alike, so one encoding serves both orders.
- **The split is by prompt.** In the competition one row in six shares its prompt. A split by row would put copies of a
  prompt on both sides, and the validation score would be too good.
- **An epoch's order is a function of (seed, epoch)**, so a resumed run needs only the number of the next batch.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minipref.layouts import LABEL_COLUMNS, TEXT_COLUMNS, read_records
from minipref.runtime import InputError, short_repr
from minipref.tokenizer import Tokenizer, replace_surrogates

SHARES = (1, 2, 2)                                                       # prompt : A : B
SPECIALS = 4                                                             # [CLS] and three [SEP]
NO_ANSWER = "(no answer)"                                                # the text that replaces a null turn
# The start of a list of texts or of messages, valid JSON or not
LIST_START = re.compile(r"""\s*\[\s*(["'“‘\]]|null|None|nan|\{\s*["'](role|content)["'])""")
MISSING = {"null", "NULL", "None", "nan", "NaN", "NA", "N/A", "n/a", "<NA>", "#N/A"}      # a missing value as text
QUOTED = re.compile(r'\s+".*"\s*', re.DOTALL)       # after a space, CSV keeps the quotes as part of a cell

Turns = tuple[str | None, ...]


# --- rows -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Pair:
    """One row: a prompt, two responses, and the annotator's choice (0 A, 1 B, 2 tie; None without labels).

    For a soft label, `target` holds the three probabilities and `label` is the most probable class.
    """

    id: str
    prompt: Turns
    response_a: Turns
    response_b: Turns
    label: int | None = None
    target: tuple[float, float, float] | None = None


def parse_turns(cell: str) -> Turns:
    """The turns in a text cell: the items of a JSON list of texts, else the cell itself as one turn.

    `null` in a list is a missing turn (None). Every cell is valid: `42`, `[1, 2]` and an empty cell are one plain turn
    each.
    """
    if cell.lstrip()[:1] != "[":
        return (cell,)
    try:
        items = json.loads(cell)
    except (ValueError, RecursionError):
        return (cell,)
    return tuple(items) if all(isinstance(item, str | None) for item in items) else (cell,)


def mend(turns: Turns) -> Turns:
    """The turns with U+FFFD for each lone surrogate, which can be neither tokenized nor written to a file."""
    return tuple(turn and replace_surrogates(turn) for turn in turns)


def are_json_lists(prompts: Iterable[object]) -> bool:
    """Whether a file's text cells are JSON lists: most of its prompts that are text begin like a JSON list of texts."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str) and prompt.strip()]
    return 2 * sum(bool(LIST_START.match(text)) for text in texts) >= len(texts)


def to_pairs(rows: Iterable[Sequence]) -> list[Pair]:
    """The pairs of Python rows (prompt, response_a, response_b), each a text, a list of turns, or None.

    Texts are read as `read_pairs` reads a file with these cells. In a list of turns, None is a missing turn. None, NaN
    and pandas' NA are empty cells.
    Errors: `InputError` naming the row, from 1, and the column of any other value.
    """
    rows = [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
    as_lists = are_json_lists(row[0] for row in rows if isinstance(row, tuple | list) and row)
    return [row if isinstance(row, Pair) else _to_pair(row, number, as_lists) for number, row in enumerate(rows, 1)]


def _to_pair(row: object, number: int, as_lists: bool) -> Pair:
    values = [value.tolist() if isinstance(value, np.ndarray) else value for value in row] if isinstance(
        row, tuple | list) else []
    if len(values) != len(TEXT_COLUMNS):
        raise InputError(row=number, found=f"{len(values)} values" if values else f"a {type(row).__name__}",
                         expected=f"a tuple of {', '.join(TEXT_COLUMNS)}; for a DataFrame, "
                                  f"frame[{list(TEXT_COLUMNS)}].itertuples(index=False)")
    segments, are_cells = [], as_lists and not isinstance(values[0], tuple | list)      # False if the prompt is a list
    for column, value in zip(TEXT_COLUMNS, values):
        if isinstance(value, str):
            turns = parse_turns(value) if are_cells else (value,)
        elif isinstance(value, tuple | list):
            turns = tuple(None if _is_missing(turn) else turn for turn in value)
        else:
            turns = ("",) if _is_missing(value) else (value,)
        for turn in turns:
            if not isinstance(turn, str | None):
                raise InputError(row=number, column=column, found=f"{short_repr(turn)} of type {type(turn).__name__}",
                                 expected="a text, a list of texts, or None; pandas.read_csv(..., dtype=str) leaves "
                                          "numbers as they are written")
        segments.append(mend(turns))
    return Pair("", *segments)


def _is_missing(value: object) -> bool:
    """Whether a value is None, NaN, or pandas' NA or NaT; without importing pandas."""
    return not isinstance(value, str) and str(value) in ("None", "nan", "<NA>", "NaT")


def read_pairs(path: str | Path, labels: str = "required", unique_ids: bool = False, soft: bool = False) -> list[Pair]:
    """The rows of a file in any of the layouts of `minipref.layouts`. Other columns are ignored.

    Text cells are JSON lists of turns if most prompts begin like a JSON list of texts; otherwise every cell is plain
    text, including an answer `[2, 4]`. Printed notes count malformed lists, broken characters, words like NaN, and
    quotes after a space.
    `labels`: "required", or "if present" (all three label columns, or none).
    `soft`: the three label columns hold probabilities.
    `unique_ids`: refuse ids that a submission cannot hold: blank, repeated, or with a carriage return.
    Errors: `InputError` naming file, row (the header is not counted) and column of the first invalid cell.
    """
    records = read_records(path, labels)
    if unique_ids:
        _check_ids([record["id"] for record in records], path)
    as_lists = are_json_lists(record["prompt"] for record in records)
    pairs, mended, plain, missing, quoted = [], [], [], [], []           # of cells: (row, column, cell)
    broken = {column: [] for column in TEXT_COLUMNS}
    for row, record in enumerate(records, 1):
        segments = []
        for column in TEXT_COLUMNS:
            cell = record[column]
            if isinstance(cell, list):
                turns, cell = tuple(cell), ""
            else:
                turns = parse_turns(cell) if as_lists else (cell,)
            segments.append(mend(turns))
            if segments[-1] != turns:
                mended.append((row, column, cell))
            if as_lists and turns == (cell,) and cell.lstrip()[:1] == "[":
                broken[column].append((row, column, cell))
            elif not as_lists and LIST_START.match(cell):
                plain.append((row, column, cell))
            elif cell.strip() in MISSING:
                missing.append((row, column, cell))
            elif QUOTED.fullmatch(cell):
                quoted.append((row, column, cell))
        cells = [record[name] for name in LABEL_COLUMNS if name in record]
        target = _probabilities(cells, path, row) if cells and soft else None
        label = int(np.argmax(target)) if target else _one_hot(cells, path, row) if cells else None
        pairs.append(Pair(record["id"], *segments, label, target))
    for column, cells in broken.items():
        advice = "a spreadsheet cuts a cell at 32,767 characters"
        if cells and cells[0][2].rstrip().endswith("]"):
            advice = ("written with json.dumps, not with str; messages with roles belong in the columns "
                      "conversation_a and conversation_b")
        if 2 * len(cells) > len(records):
            raise InputError(file=path, row=cells[0][0], column=column, expected=f"JSON: {advice}",
                             found=f"{len(cells):,} cells with a list that is not a JSON list of texts, the first "
                                   f"{short_repr(cells[0][2])}")
        _note(path, cells, f"with a list that is not a JSON list of texts, read as text ({advice})")
    _note(path, plain, "that may be a list, read as text because most prompts are plain text")
    _note(path, missing, "with only a word for a missing value, like NaN, read as text")
    _note(path, quoted, "with a space before the opening quote, so the quotes are read as text")
    _note(path, mended, "with invalid characters replaced (U+FFFD for half of a UTF-16 pair)")
    return pairs


def _note(path: str | Path, cells: list[tuple[int, str, str]], what: str) -> None:
    """Print the number of such cells and the place of the first."""
    if cells:
        print(f"note: {path}: {len(cells):,} cell{'s' * (len(cells) > 1)} {what}; the first: row {cells[0][0]}, column "
              f"{cells[0][1]}")


def _check_ids(ids: list[str], path: str | Path) -> None:
    """Errors: `InputError` for an id that a submission could not hold."""
    seen: dict[str, int] = {}
    for row, id in enumerate(ids, 1):
        if not id.strip() or "\r" in id:
            raise InputError(file=path, row=row, column="id", found=short_repr(id) if id.strip() else "a blank id",
                             expected="any non-empty text without a carriage return")
        if id in seen:
            raise InputError(file=path, row=row, column="id", expected="ids that are unique in the file",
                             found=f"{short_repr(id)}, already the id of row {seen[id]}")
        seen[id] = row


def _probabilities(cells: list[str], path: str | Path, row: int) -> tuple[float, float, float]:
    """The soft label that three cells hold."""
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        values = [math.nan]
    if not (min(values) >= 0 and abs(sum(values) - 1) < 1e-3):
        raise InputError(file=path, row=row, column=", ".join(LABEL_COLUMNS), found=short_repr(",".join(cells)),
                         expected="three probabilities that sum to 1")
    return tuple(value / sum(values) for value in values)


def _one_hot(cells: list[str], path: str | Path, row: int) -> int:
    """The class that three label cells name."""
    values = []
    for column, cell in zip(LABEL_COLUMNS, cells):
        if cell.strip() not in ("0", "1", "0.0", "1.0"):
            raise InputError(file=path, row=row, column=column, found=short_repr(cell), expected="0 or 1")
        values.append(cell.strip()[0] == "1")
    if sum(values) != 1:
        raise InputError(file=path, row=row, column=", ".join(LABEL_COLUMNS), found=short_repr(",".join(cells)),
                         expected="exactly one 1")
    return values.index(True)


def count_missing(pairs: Sequence[Pair]) -> int:
    """Turns of responses that are missing (None, or no turn at all) or blank, in all rows together."""
    return sum(not (turn or "").strip() for p in pairs for turns in (p.response_a, p.response_b)
               for turn in turns or (None,))


def character_counts(pairs: Sequence[Pair]) -> np.ndarray:
    """Characters of each row's prompt, A and B, over all turns. Shapes: N rows -> (N, 3) int64."""
    return np.array([[sum(len(turn or "") for turn in turns) for turns in (p.prompt, p.response_a, p.response_b)]
                     for p in pairs])


# --- splitting --------------------------------------------------------------------------------------------------------

def prompt_key(prompt: Turns) -> str:
    """A key that is equal for equal prompts: the turns without case, character width and extra white space."""
    return "\0".join(" ".join(unicodedata.normalize("NFKC", turn or "").casefold().split()) for turn in prompt)


def split_by_prompt(prompts: Sequence[Turns], labels: Sequence[int], shares: Sequence[float], seed: int) -> np.ndarray:
    """Split rows into parts of the given shares. Rows with the same prompt stay together, and labels stay balanced.

    `shares` (K,) are positive and sum to 1: (0.9, 0.1) for a validation split, (0.2,) * 5 for folds. The groups of rows
    are shuffled by `seed` and assigned largest first, each to the part that still lacks its labels most.
    Shapes: N prompts, N labels in 0..2 -> (N,) int64, the part of each row.
    """
    group_of: dict[str, int] = {}
    groups = np.array([group_of.setdefault(prompt_key(prompt), len(group_of)) for prompt in prompts])
    counts = np.zeros((len(group_of), len(LABEL_COLUMNS)))
    np.add.at(counts, (groups, np.asarray(labels)), 1)

    wanted = np.outer(shares, counts.sum(0)).clip(min=1e-9)              # (K, C)
    lacking = wanted.copy()
    part_of_group = np.empty(len(group_of), dtype=np.int64)
    shuffled = np.random.default_rng([seed, 1]).permutation(len(group_of))
    for group in shuffled[np.argsort(-counts[shuffled].sum(1), kind="stable")]:
        part = np.argmax((lacking / wanted) @ counts[group])
        part_of_group[group] = part
        lacking[part] -= counts[group]
    return part_of_group[groups]


# --- token ids --------------------------------------------------------------------------------------------------------

def truncation_budgets(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens prompt, A and B may keep each, out of `room` tokens in all.

    Shares are 1 : 2 : 2. The unused tokens of a short segment are divided among the others in the same proportion. An
    odd token goes to the prompt or stays unused, so A and B are always treated alike.
    """
    budgets, open_segments = list(lengths), {0, 1, 2}
    if sum(lengths) <= room:
        return budgets
    while True:
        weight = sum(SHARES[f] for f in open_segments)
        fitting = {f for f in open_segments if lengths[f] * weight <= room * SHARES[f]}
        if not fitting:
            break
        room -= sum(lengths[f] for f in fitting)
        open_segments -= fitting
    for f in open_segments:
        budgets[f] = room * SHARES[f] // weight
    if 0 in open_segments:
        budgets[0] = min(lengths[0], room - sum(budgets[f] for f in open_segments - {0}))
    return budgets


def truncate_head_tail(ids: list[int], budget: int) -> list[int]:
    """The first and the last tokens of a segment that is too long, half and half."""
    if len(ids) <= budget:
        return ids
    tail = budget // 2
    return ids[:budget - tail] + ids[len(ids) - tail:]


def segment_texts(turns: Turns) -> list[str]:
    """A segment as a list of texts to tokenize. Several turns are numbered, so that they stay separate."""
    texts = [NO_ANSWER if turn is None else turn for turn in turns]
    if len(texts) == 1:
        return texts
    return [part for number, text in enumerate(texts, 1) for part in (f"Turn {number}:", text)]


@dataclass
class TokenizedPairs:
    """Rows as token ids: all segments concatenated in one array, with the offsets of each.

    tokens (T,) int32; offsets (N, 4) int64: row n's prompt, A and B lie between offsets[n, 0..3]; labels (N,) int64,
    -1 for none; num_truncated (N,) int64 counts the tokens removed from each row; targets (N, 3) float32 if any label
    is soft, else None.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    num_truncated: np.ndarray
    max_length: int
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each row's sequence, including the four special tokens."""
        return self.offsets[:, 3] - self.offsets[:, 0] + SPECIALS

    def segments(self, row: int) -> list[np.ndarray]:
        begin = self.offsets[row]
        return [self.tokens[begin[f]:begin[f + 1]] for f in range(3)]

    def truncation(self) -> str:
        """One line: how many rows were truncated, and by how much."""
        rows = self.num_truncated[self.num_truncated > 0]
        if not len(rows):
            return f"no row is longer than {self.max_length} tokens"
        share = np.median(rows / (self.num_truncated + self.lengths)[self.num_truncated > 0])
        return (f"{len(rows):,} of {len(self):,} rows ({len(rows) / len(self):.0%}) truncated to {self.max_length} "
                f"tokens; the median of them loses {int(np.median(rows)):,} tokens ({share:.0%}), the worst "
                f"{rows.max():,}")

    def take(self, rows: np.ndarray) -> "TokenizedPairs":
        """The given rows in the given order. The tokens are shared, not copied."""
        return TokenizedPairs(self.tokens, self.offsets[rows], self.labels[rows], self.num_truncated[rows],
                              self.max_length, None if self.targets is None else self.targets[rows])


def encode_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer, max_length: int, progress: bool = False
                 ) -> TokenizedPairs:
    """Tokenize rows and truncate them to `max_length` tokens, in blocks of rows to limit memory."""
    if max_length < SPECIALS + 3:
        raise InputError(found=f"a maximum length of {max_length}", expected=f"at least {SPECIALS + 3} tokens")
    chunks, lengths, num_truncated = [], [], []
    for begin in tqdm(range(0, len(pairs), 1000), desc="tokenizing", unit="k rows", leave=False, disable=not progress):
        block = pairs[begin:begin + 1000]
        segments = [turns for pair in block for turns in (pair.prompt, pair.response_a, pair.response_b)]
        encoded = iter(_encode_segments(segments, tokenizer))
        for prompt, a, b in zip(encoded, encoded, encoded):
            full = [len(prompt), len(a), len(b)]
            budgets = truncation_budgets(full, max_length - SPECIALS)
            kept = [truncate_head_tail(ids, budget) for ids, budget in zip((prompt, a, b), budgets)]
            chunks.extend(np.array(ids, dtype=np.int32) for ids in kept)
            lengths.append([len(ids) for ids in kept])
            num_truncated.append(sum(full) - sum(lengths[-1]))
    ends = np.cumsum(np.array(lengths, dtype=np.int64).reshape(-1)).reshape(-1, 3)
    offsets = np.column_stack([np.concatenate([[0], ends[:-1, 2]]), ends])
    labels = np.array([-1 if pair.label is None else pair.label for pair in pairs], dtype=np.int64)
    targets = None                      # one-hot soft labels give the same bits as hard labels
    if any(pair.target and max(pair.target) < 1 for pair in pairs):
        one_hot = np.eye(3).tolist()
        targets = np.array([pair.target or one_hot[pair.label] for pair in pairs], dtype=np.float32)
    return TokenizedPairs(np.concatenate(chunks), offsets, labels, np.array(num_truncated, dtype=np.int64),
                          max_length, targets)


def _encode_segments(segments: list[Turns], tokenizer: Tokenizer) -> Iterator[list[int]]:
    texts = [segment_texts(turns) for turns in segments]
    encoded = iter(tokenizer.encode_batch([text for segment in texts for text in segment]))
    for segment in texts:
        yield [token for _ in segment for token in next(encoded)]


# --- batches ----------------------------------------------------------------------------------------------------------

def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers in shuffled batches of rows of similar length; the order depends on (seed, epoch).

    All rows are shuffled and divided into chunks of 50 batches. Each chunk is sorted by length and cut into batches.
    Then the batches are shuffled. This keeps padding small, and each epoch has different batches.
    """
    random = np.random.default_rng([seed, 2, epoch])
    order = random.permutation(len(lengths))
    stretch = 50 * batch_size
    batches = []
    for begin in range(0, len(order), stretch):
        rows = order[begin:begin + stretch]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        batches.extend(rows[i:i + batch_size] for i in range(0, len(rows), batch_size))
    return [batches[i] for i in random.permutation(len(batches))]


def swap_mask(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Which rows have A and B swapped in this epoch, each with probability 1/2. Shapes: -> (rows,) bool."""
    return np.random.default_rng([seed, 3, epoch]).random(rows) < 0.5


def batches_by_tokens(lengths: np.ndarray, batch_tokens: int, most_rows: int = 256) -> Iterator[np.ndarray]:
    """Row numbers, longest first, in batches of at most `batch_tokens` tokens including padding (or of one row)."""
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        rows = max(1, min(most_rows, batch_tokens // int(lengths[order[begin]])))
        yield order[begin:begin + rows]
        begin += rows


def collate(tokenized: TokenizedPairs, rows: Iterable[int], swapped: Iterable[bool], tokenizer: Tokenizer,
            multiple_of: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """One padded batch. Where `swapped`, B comes before A and the label is swapped too.

    L is the length of the longest sequence, rounded up to a multiple of `multiple_of`.
    Shapes: -> input_ids (B, L) int64, attention_mask (B, L) bool, labels (B,) int64 (-1 for none), or soft ones (B, 3).
    """
    sequences, labels = [], []
    for row, swap in zip(rows, swapped):
        prompt, a, b = tokenized.segments(row)
        first, second = (b, a) if swap else (a, b)
        sep = [tokenizer.sep_id]
        sequences.append(np.concatenate([[tokenizer.cls_id], prompt, sep, first, sep, second, sep]))
        label = tokenized.labels[row]
        if tokenized.targets is not None:
            labels.append(swap_classes(tokenized.targets[row]) if swap else tokenized.targets[row])
        else:
            labels.append({0: 1, 1: 0}.get(label, label) if swap else label)
    longest = -(-max(map(len, sequences)) // multiple_of) * multiple_of
    input_ids = np.full((len(sequences), longest), tokenizer.pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(sequences), longest), dtype=bool)
    for i, sequence in enumerate(sequences):
        input_ids[i, :len(sequence)] = sequence
        attention_mask[i, :len(sequence)] = True
    return torch.from_numpy(input_ids), torch.from_numpy(attention_mask), torch.from_numpy(np.array(labels))


def swap_classes(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities or logits (..., 3) of the swapped pair: A and B change places."""
    return probabilities[..., [1, 0, 2]]
