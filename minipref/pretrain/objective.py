"""What makes DeBERTa-v3 'v3': replaced-token detection, and word embeddings that two networks share without conflict.

BERT masks 15% of the tokens and predicts them (MLM, masked language modelling). The other 85% have no loss. ELECTRA has
a loss for every token. A small *generator*, itself trained by MLM, fills the masked places with tokens sampled from its
prediction. The encoder, the *discriminator*, predicts of each token whether it was replaced (RTD, replaced-token
detection):

    text          the  judge  read  both  answers  twice
    masked        the  judge [MASK] both  answers [MASK]
    corrupted     the  judge  gave  both  answers  twice      sampled from the generator, which can be right
    labels         0     0     1     0      0       0         1 where the token now differs from the text

    L = L_MLM(generator) + 50 L_RTD(discriminator)            only the discriminator is kept

Both networks start with word embeddings. How they share them is v3's own idea (`Pretraining.discriminator_table`):

    ES     E_D = E                  one table, as in ELECTRA: MLM pulls similar words together and RTD pulls them apart
    NES    E_D = its own            no conflict, but the discriminator learns nothing from the generator's table
    GDES   E_D = sg(E_G) + E_delta  gradient-disentangled, v3: sg() stops the gradient, so RTD trains E_delta alone

Unusual here:
- Masking is by token, and every masked token becomes [MASK], as in Microsoft's RTD code: the discriminator never sees a
  [MASK], so BERT's 80/10/10 has no purpose there. `--objective mlm` keeps the encoder that does, and uses 80/10/10.
- The discriminator's head adds [CLS] to every token before it classifies it, as Microsoft's does (the papers do not say
  so). [CLS]'s own label is always 'original'; through this sum it learns from the labels of all other tokens.

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
RTD_WEIGHT = 50.0             # the paper's lambda: a mean over all tokens, RTD's loss is small beside MLM's


# --- masking ----------------------------------------------------------------------------------------------------------

def sample_mask(input_ids: Tensor, is_special: Tensor, fraction: float = MASK_FRACTION) -> Tensor:
    """Which tokens to mask: `fraction` of each window's length, rounded, and no special token.

    Shapes: input_ids (B, L), is_special (B, L) bool -> (B, L) bool.
    """
    order = torch.rand(input_ids.shape, device=input_ids.device).masked_fill(is_special, 2.0)
    chosen = order.topk(round(fraction * input_ids.shape[1]), dim=1, largest=False).indices
    return torch.zeros_like(is_special).scatter(1, chosen, True) & ~is_special


def bert_mask(input_ids: Tensor, is_masked: Tensor, mask_id: int, vocab_size: int) -> Tensor:
    """BERT's corruption: of the masked tokens 80% become [MASK], 10% a random id, 10% stay, so that its encoder is
    trained on real words too.

    Shapes: input_ids (B, L), is_masked (B, L) bool -> (B, L).
    """
    draw = torch.rand(input_ids.shape, device=input_ids.device)
    random_or_same = torch.where(draw < 0.9, torch.randint_like(input_ids, vocab_size), input_ids)
    return torch.where(is_masked, torch.where(draw < 0.8, mask_id, random_or_same), input_ids)


def sample_categorical(logits: Tensor) -> Tensor:
    """Sample one id from each row's softmax(logits): the first whose cumulative probability passes a uniform number.

    That takes one random number a row; `torch.multinomial` draws one for each id of the vocabulary.
    Shapes: (M, V) -> (M,) int64.
    """
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    threshold = torch.rand(len(logits), 1, device=logits.device) * cumulative[:, -1:]      # the sum is 1 only nearly
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


# --- heads and losses -------------------------------------------------------------------------------------------------

class MaskedTokenHead(nn.Module):
    """Predicts the masked tokens; the word embeddings are its output layer.

    The table may have more rows than the tokenizer has ids (v3: 128,100 for 128,001). Those are never predicted.
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
    """Generator and discriminator with their heads. For objective "mlm": a generator of full depth, and nothing else.

    The generator is as wide as the discriminator, whose word embeddings it shares, and half as deep.
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
            nn.init.zeros_(self.discriminator.word_embeddings.weight)         # from here on this parameter is E_delta
        special = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
        self.register_buffer("special_ids", torch.tensor(special), persistent=False)

    def discriminator_table(self) -> Tensor:
        """The discriminator's word embeddings. Shapes: -> (V, D). Paper: DeBERTaV3, section 3.3."""
        if self.sharing == "gdes":
            return self.generator.word_embeddings.weight.detach() + self.discriminator.word_embeddings.weight
        return self.discriminator.word_embeddings.weight                      # nes: its own; es: the generator's too

    def corrupt(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mask some tokens, predict them with the generator, and replace them by samples from its prediction.

        A sampled id is a number and not a function of the weights: no gradient flows back through `corrupted_ids`.
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
        """The discriminator's logits that each token was replaced, float32. Shapes: (B, L) -> (B, L)."""
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
        """Replace fresh weights by a trained encoder's: all in the discriminator; in the generator the word embeddings
        and as many of the lowest layers as it has, for "mlm" all. The heads stay fresh."""
        trained = encoder.state_dict()
        for network in (self.generator, self.discriminator) if self.objective == "rtd" else (self.generator,):
            network.load_state_dict({name: trained[name] for name in network.state_dict()})
        if self.objective == "rtd" and self.sharing == "gdes":
            nn.init.zeros_(self.discriminator.word_embeddings.weight)         # E_G has the words; E_delta starts at 0

    def kept_encoder(self) -> tuple[Encoder, Tensor]:
        """What pretraining is for: the encoder, and its word embeddings (V, D) as one table."""
        if self.objective == "mlm":
            return self.generator, self.generator.word_embeddings.weight
        return self.discriminator, self.discriminator_table()
