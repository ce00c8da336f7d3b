"""Supervised fine-tuning: next-token cross-entropy on the trained tokens of conversations.

B rows, T tokens, N trained positions, D width
"""

from typing import Literal

import torch
from peft import PeftConfig
from torch import Tensor

from lit_alignment.data.batching.collate import TargetBatch
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.metrics import TokenMean
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.head import base_model, check_head, head_loss
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.logprobs import hidden_at_targets, of_this_rank
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.generative import GenerativeModule
from lit_alignment.optimization import OptimizerConfig

Stage = Literal["train", "val", "test"]


class SFTModule(GenerativeModule):
    """A causal language model trained to produce the responses of conversations.

    loss of an optimiser step = sum of the trained tokens' losses / number of trained tokens, both over all
    micro-batches of the accumulation window and all ranks.

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library; without these and `adapter` all weights train.
        adapter: An adapter that exists, frozen or to go on with.
        tokens: Special and new tokens; with LoRA only the rows of new ones train.
        optimizer: Optimiser and schedule.
        label_smoothing: Probability spread evenly over the vocabulary, in training only.
        neftune_alpha: Strength of uniform noise on the embeddings in training; 0 is none (Jain et al. 2023,
            arXiv:2310.05914; the paper uses 5).
        generation: Named ways to answer in `predict`.
    """

    shares_batches = True

    def __init__(
        self,
        backbone: BackboneConfig,
        peft: PeftConfig | None = None,
        adapter: AdapterConfig | None = None,
        tokens: TokensConfig = TokensConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        label_smoothing: float = 0.0,
        neftune_alpha: float = 0.0,
        generation: dict[str, DecodingConfig] | None = None,
    ) -> None:
        """Set up the metrics; the weights come in `configure_model`."""
        super().__init__(backbone, peft, adapter, tokens, optimizer, generation)
        self.label_smoothing = label_smoothing
        self.neftune_alpha = neftune_alpha
        self.val_loss, self.val_accuracy = TokenMean(), TokenMean()
        self.test_loss, self.test_accuracy = TokenMean(), TokenMean()
        self._head_checked = False

    def training_step(self, batch: TargetBatch, batch_idx: int) -> Tensor:
        """The batch's share of the optimiser step's loss."""
        return self._shared_step(batch, "train")

    def validation_step(self, batch: TargetBatch, batch_idx: int) -> None:
        """Add the batch to the validation metrics."""
        self._shared_step(batch, "val")

    def test_step(self, batch: TargetBatch, batch_idx: int) -> None:
        """Add the batch to the test metrics."""
        self._shared_step(batch, "test")

    def _shared_step(self, batch: TargetBatch, stage: Stage) -> Tensor:
        loss_sum, hits, weights = self._summed_loss(batch, self.label_smoothing if stage == "train" else 0.0)
        if stage == "train":
            return self.step_loss(loss_sum, batch.window_weight)
        mean_loss, mean_accuracy = self._means(stage)
        mean_loss.update(loss_sum, weights.sum())
        mean_accuracy.update(hits, torch.tensor(len(weights), device=weights.device))
        return loss_sum

    def _summed_loss(self, batch: TargetBatch, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum of the trained tokens' losses, number of hits, and the weight of each, [N]; all of this rank."""
        if not self._head_checked:
            check_head(self.network, batch.input_ids[:1, :8])
            self._head_checked = True
        hidden = self._hidden_states(batch)
        targets, weights = (of_this_rank(each, batch, self.sequence) for each in (batch.targets, batch.weights))
        loss_sum, hits = head_loss(self.network, hidden, targets, weights, label_smoothing)
        return loss_sum, hits, weights

    def _hidden_states(self, batch: TargetBatch) -> Tensor:
        """Hidden states that predict this rank's targets, [N, D], with noise on the embeddings in training."""
        if not self.training or self.neftune_alpha == 0:
            return hidden_at_targets(self.network, batch, self.sequence)
        own = self.own_tokens(batch)
        hook = (
            base_model(self.network)
            .get_input_embeddings()
            .register_forward_hook(
                lambda module, inputs, output: output + neftune_noise(output, batch, self.neftune_alpha, own)
            )
        )
        try:
            return hidden_at_targets(self.network, batch, self.sequence)
        finally:
            hook.remove()

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_means("test")

    def _log_means(self, stage: Stage) -> None:
        mean_loss, mean_accuracy = self._means(stage)
        loss = mean_loss.compute()
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/perplexity", loss.exp())
        self.log(f"{stage}/token_accuracy", mean_accuracy.compute(), prog_bar=True)
        mean_loss.reset()
        mean_accuracy.reset()

    def _means(self, stage: Stage) -> tuple[TokenMean, TokenMean]:
        if stage == "test":
            return self.test_loss, self.test_accuracy
        return self.val_loss, self.val_accuracy


def neftune_noise(embedded: Tensor, batch: TargetBatch, alpha: float, own: slice = slice(None)) -> Tensor:
    """Uniform noise in [-1, 1] * alpha / sqrt(L * D), where L is the length of a token's own document.

    Args:
        embedded: Token embeddings, [B, T, D].
        batch: Tells the document lengths.
        alpha: Strength.
        own: The tokens of the batch that are embedded.
    """
    if batch.document_lengths:
        lengths = torch.tensor(batch.document_lengths, device=embedded.device)
        per_token = lengths.repeat_interleave(lengths)[None]  # [1, T]
    elif batch.attention_mask is not None:
        per_token = batch.attention_mask.sum(1, keepdim=True).expand_as(batch.attention_mask)
    else:
        per_token = torch.full_like(batch.input_ids, batch.input_ids.shape[1])
    bound = alpha / (per_token[:, own].to(embedded.dtype) * embedded.shape[-1]).sqrt()
    return torch.empty_like(embedded).uniform_(-1, 1) * bound[..., None]
