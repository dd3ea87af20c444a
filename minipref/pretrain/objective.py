"""DeBERTa-v3's pretraining objective: replaced-token detection with gradient-disentangled embedding sharing.

BERT masks 15% of the tokens and predicts them (MLM, masked language modelling). The other 85% have no loss. ELECTRA has
a loss for every token. A small *generator*, trained by MLM, replaces the masked tokens by samples from its prediction.
The encoder, the *discriminator*, predicts for each token whether it was replaced (RTD, replaced-token detection):

    text          the  judge  read  both  answers  twice
    masked        the  judge [MASK] both  answers [MASK]
    corrupted     the  judge  gave  both  answers  twice      samples from the generator, some of them correct
    labels         0     0     1     0      0       0         1 where the token differs from the text

    L = L_MLM(generator) + 50 L_RTD(discriminator)            only the discriminator is kept

Both networks have word embeddings: one shared table (ES), two separate tables (NES), or v3's mixture (GDES;
`Pretraining.discriminator_table`):

    ES     E_D = E                  one table, as in ELECTRA: MLM pulls similar words together and RTD pulls them apart
    NES    E_D = its own            no conflict, but the discriminator learns nothing from the generator's table
    GDES   E_D = sg(E_G) + E_delta  gradient-disentangled, v3: sg() stops the gradient, so RTD trains only E_delta

What is unusual here:
- Every masked token becomes [MASK], as in Microsoft's RTD code. BERT's 80/10/10 rule is for encoders that see no [MASK]
  after pretraining; the discriminator never sees one. `--objective mlm` uses 80/10/10.
- The discriminator's head adds the hidden state of [CLS] to every token's, as in Microsoft's code (the papers do not
  mention it). The label of [CLS] is always 'original'; through this sum [CLS] is trained by all other labels.

Paper: DeBERTaV3 (arXiv 2111.09543), section 3; ELECTRA (arXiv 2003.10555).
Differs: v3's generator has absolute positions before its last layers (the 'enhanced mask decoder'); ours has none.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minipref.config import EncoderConfig
from minipref.model import Encoder, init_weights
from minipref.tokenizer import Tokenizer

MASK_FRACTION = 0.15
RTD_WEIGHT = 50.0             # the paper's lambda: RTD's loss, a mean over all tokens, is much smaller than MLM's


# --- masking ----------------------------------------------------------------------------------------------------------

def sample_mask(input_ids: Tensor, is_special: Tensor, fraction: float = MASK_FRACTION) -> Tensor:
    """The tokens to mask: `fraction` of each window's length, rounded, without special tokens.

    Shapes: input_ids (B, L), is_special (B, L) bool -> (B, L) bool.
    """
    order = torch.rand(input_ids.shape, device=input_ids.device).masked_fill(is_special, 2.0)
    chosen = order.topk(round(fraction * input_ids.shape[1]), dim=1, largest=False).indices
    return torch.zeros_like(is_special).scatter(1, chosen, True) & ~is_special


def bert_mask(input_ids: Tensor, is_masked: Tensor, mask_id: int, vocab_size: int) -> Tensor:
    """BERT's corruption: 80% of the masked tokens become [MASK], 10% a random id, 10% stay, because the encoder will
    be used on text without [MASK].

    Shapes: input_ids (B, L), is_masked (B, L) bool -> (B, L).
    """
    draw = torch.rand(input_ids.shape, device=input_ids.device)
    random_or_same = torch.where(draw < 0.9, torch.randint_like(input_ids, vocab_size), input_ids)
    return torch.where(is_masked, torch.where(draw < 0.8, mask_id, random_or_same), input_ids)


def sample_categorical(logits: Tensor) -> Tensor:
    """Sample an id per row from softmax(logits): the first whose cumulative probability exceeds a uniform number.

    This needs one random number per row; `torch.multinomial` draws one for each id of the vocabulary.
    Shapes: (M, V) -> (M,) int64.
    """
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    threshold = torch.rand(len(logits), 1, device=logits.device) * cumulative[:, -1:]      # the sum is not exactly 1
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


# --- heads and losses -------------------------------------------------------------------------------------------------

class MaskedTokenHead(nn.Module):
    """Predicts the masked tokens; the word embeddings are its output layer.

    The table may have more rows than the tokenizer has ids (v3: 128,100 for 128,001). Surplus rows are not predicted.
    Shapes: x (M, D), table (V or more, D) -> (M, V).
    """

    def __init__(self, config: EncoderConfig, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), table[:len(self.bias)], self.bias)


class ReplacedTokenHead(nn.Module):
    """Predicts whether each token was replaced, as a logit. Shapes: x (B, L, D) -> (B, L)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x[:, :1] + x)                                      # [CLS] is the first token of every window
        return self.classifier(F.gelu(self.dense(x))).squeeze(-1)


def masked_token_loss(mlm_logits: Tensor, input_ids: Tensor, is_masked: Tensor) -> Tensor:
    """L_MLM, the mean over the masked tokens. Shapes: mlm_logits (M, V), input_ids, is_masked (B, L) -> ()."""
    return F.cross_entropy(mlm_logits, input_ids[is_masked])


def replaced_token_loss(rtd_logits: Tensor, corrupted_ids: Tensor, input_ids: Tensor) -> Tensor:
    """L_RTD, the mean over all tokens. Shapes: (B, L) each -> ()."""
    return F.binary_cross_entropy_with_logits(rtd_logits, (corrupted_ids != input_ids).float())


# --- generator and discriminator --------------------------------------------------------------------------------------

class Pretraining(nn.Module):
    """Generator and discriminator with their heads. For objective "mlm", only a generator of full depth.

    The generator has the discriminator's width and half its layers.
    """

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer, objective: str = "rtd", sharing: str = "gdes"):
        super().__init__()
        self.config, self.objective, self.sharing = config, objective, sharing
        self.vocab_size, self.mask_id = tokenizer.vocab_size, tokenizer.mask_id
        depth = config.num_hidden_layers if objective == "mlm" else max(1, config.num_hidden_layers // 2)
        self.generator = Encoder(replace(config, num_hidden_layers=depth))
        self.masked_token_head = MaskedTokenHead(config, self.vocab_size)
        if objective == "rtd":
            self.discriminator = Encoder(config)
            self.replaced_token_head = ReplacedTokenHead(config)
        init_weights(self, config.initializer_range)
        if objective == "rtd" and sharing == "es":
            self.discriminator.word_embeddings = self.generator.word_embeddings
        if objective == "rtd" and sharing == "gdes":
            nn.init.zeros_(self.discriminator.word_embeddings.weight)         # this parameter is now E_delta
        special = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
        self.register_buffer("special_ids", torch.tensor(special), persistent=False)

    def discriminator_table(self) -> Tensor:
        """The discriminator's word embeddings. Shapes: -> (V, D). Paper: DeBERTaV3, section 3.3."""
        if self.sharing == "gdes":
            return self.generator.word_embeddings.weight.detach() + self.discriminator.word_embeddings.weight
        return self.discriminator.word_embeddings.weight                      # nes: its own; es: also the generator's

    def corrupt(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mask some tokens, predict them with the generator, and replace them by samples from its prediction.

        Sampling is not differentiable: no gradient flows through `corrupted_ids`.
        Shapes: input_ids (B, L) -> is_masked (B, L) bool, corrupted_ids (B, L), mlm_logits (M, V) float32.
        """
        is_masked = sample_mask(input_ids, self.is_special(input_ids))
        if self.objective == "mlm":
            masked_ids = bert_mask(input_ids, is_masked, self.mask_id, self.vocab_size)
        else:
            masked_ids = input_ids.masked_fill(is_masked, self.mask_id)
        x = self.generator(masked_ids, torch.ones_like(is_masked))[is_masked]                      # (M, D)
        mlm_logits = self.masked_token_head(x, self.generator.word_embeddings.weight).float()      # (M, V)
        corrupted_ids = input_ids.masked_scatter(is_masked, sample_categorical(mlm_logits.detach()))
        return is_masked, corrupted_ids, mlm_logits

    def discriminate(self, corrupted_ids: Tensor) -> Tensor:
        """The discriminator's logits for 'replaced', float32. Shapes: (B, L) -> (B, L)."""
        x = functional_call(self.discriminator, {"word_embeddings.weight": self.discriminator_table()},
                            (corrupted_ids, torch.ones_like(corrupted_ids, dtype=torch.bool)))      # (B, L, D)
        return self.replaced_token_head(x).float()

    def is_special(self, input_ids: Tensor) -> Tensor:
        """Shapes: (B, L) -> (B, L) bool."""
        return torch.isin(input_ids, self.special_ids)

    def trainable_parts(self) -> list[nn.Module]:
        """One module for each optimizer: the generator with its head, and for "rtd" the discriminator with its own.

        A shared table belongs to the generator's part.
        """
        parts = [nn.ModuleList([self.generator, self.masked_token_head])]
        if self.objective == "rtd":
            own = [part for part in self.discriminator.children() if part is not self.generator.word_embeddings]
            parts.append(nn.ModuleList([*own, self.replaced_token_head]))
        return parts

    def load_encoder_weights(self, encoder: Encoder) -> None:
        """Copy a trained encoder's weights: all into the discriminator; into the generator the embeddings and lowest
        layers, for "mlm" all. The heads keep their initial weights."""
        trained = encoder.state_dict()
        for network in (self.generator, self.discriminator) if self.objective == "rtd" else (self.generator,):
            network.load_state_dict({name: trained[name] for name in network.state_dict()})
        if self.objective == "rtd" and self.sharing == "gdes":
            nn.init.zeros_(self.discriminator.word_embeddings.weight)         # E_G has the table; E_delta starts at 0

    def kept_encoder(self) -> tuple[Encoder, Tensor]:
        """The encoder to export, and its word embeddings (V, D) as one table."""
        if self.objective == "mlm":
            return self.generator, self.generator.word_embeddings.weight
        return self.discriminator, self.discriminator_table()
