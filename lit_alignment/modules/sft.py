"""Supervised fine-tuning: next-token cross-entropy on the trained tokens of conversations.

B rows, T tokens, N trained positions, D width
"""

import torch
from peft import PeftConfig
from torch import Tensor
from torchmetrics import Metric

from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.data.batching.collate import TargetBatch
from lit_alignment.data.sft import SFTDataModule
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.hooks import Stage
from lit_alignment.metrics import TokenMean
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.head import base_model, head_loss
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.logprobs import hidden_at_targets, of_this_rank
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.generative import GenerativeModule
from lit_alignment.optimization import OptimizerConfig


class SFTModule(GenerativeModule):
    """A causal language model trained to produce the responses of conversations.

    loss of an optimizer step = sum of the trained tokens' losses / number of trained tokens, both over all
    micro-batches of the accumulation window and all ranks.

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library; without these and `adapter` all weights train.
        adapter: An existing adapter, frozen or to be trained further.
        tokens: Special and new tokens; with LoRA only the rows of new ones train.
        optimizer: Optimizer and schedule.
        label_smoothing: Probability spread evenly over the vocabulary, in training only.
        neftune_alpha: Strength of uniform noise on the embeddings in training; 0 is none (Jain et al. 2023,
            arXiv:2310.05914; the paper uses 5).
        generation: Decoding configurations of `predict`, by name.
    """

    shares_batches = True
    title = "supervised fine-tuning"
    data_classes: tuple[type[AlignmentDataModule], ...] = (SFTDataModule,)
    progress_bar = ("loss", "token_accuracy")

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
        """Keep the settings; the weights come in `configure_model`."""
        super().__init__(backbone, peft, adapter, tokens, optimizer, generation)
        self.label_smoothing = label_smoothing
        self.neftune_alpha = neftune_alpha

    def stage_metrics(self) -> dict[str, Metric]:
        """Means over trained tokens."""
        return {"loss": TokenMean(), "token_accuracy": TokenMean()}

    def step(self, batch: TargetBatch, stage: Stage) -> Tensor:
        """Summed cross-entropy of the trained tokens, and their accuracy."""
        loss_sum, hits, weights = self._summed_loss(batch, self.label_smoothing if stage == "train" else 0.0)
        if stage == "train":
            return self.step_loss(loss_sum, batch.window_weight)
        metrics = self.metrics_of(stage)
        metrics["loss"].update(loss_sum, weights.sum())
        metrics["token_accuracy"].update(hits, torch.tensor(len(weights), device=weights.device))
        return loss_sum

    def stage_values(self, stage: Stage) -> dict[str, Tensor | float]:
        """Also the perplexity."""
        values = super().stage_values(stage)
        return {**values, "perplexity": torch.as_tensor(values["loss"]).exp()}

    def _summed_loss(self, batch: TargetBatch, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum of the trained tokens' losses, number of hits, and the weight of each, [N]; all of this rank."""
        hidden = self._hidden_states(batch)
        targets, weights = (of_this_rank(each, batch, self.sequence) for each in (batch.targets, batch.weights))
        loss_sum, hits = head_loss(self.network, hidden, targets, weights, label_smoothing)
        return loss_sum, hits, weights

    def _hidden_states(self, batch: TargetBatch) -> Tensor:
        """Hidden states that predict this rank's targets, [N, D], with noise on the embeddings in training."""
        if not self.training or self.neftune_alpha == 0:
            return hidden_at_targets(self.network, batch, self.sequence)
        local = self.local_tokens(batch)
        embedding = base_model(self.network).get_input_embeddings()
        hook = embedding.register_forward_hook(
            lambda module, inputs, output: output + neftune_noise(output, batch, self.neftune_alpha, local)
        )
        try:
            return hidden_at_targets(self.network, batch, self.sequence)
        finally:
            hook.remove()


def neftune_noise(embedded: Tensor, batch: TargetBatch, alpha: float, own: slice = slice(None)) -> Tensor:
    """Uniform noise in [-1, 1] * alpha / sqrt(L * D), where L is the length of a token's own document.

    Args:
        embedded: Token embeddings, [B, T, D].
        batch: Tells the document lengths.
        alpha: Strength.
        own: The tokens of the batch that are embedded.
    """
    if batch.document_lengths:
        of_tokens = [length for length in batch.document_lengths for _ in range(length)]
        per_token = torch.tensor([of_tokens]).to(embedded.device, non_blocking=True)  # [1, T]
    elif batch.attention_mask is not None:
        per_token = batch.attention_mask.sum(1, keepdim=True).expand_as(batch.attention_mask)
    else:
        per_token = torch.full_like(batch.input_ids, batch.input_ids.shape[1])
    bound = alpha / (per_token[:, own].to(embedded.dtype) * embedded.shape[-1]).sqrt()
    return torch.empty_like(embedded).uniform_(-1, 1) * bound[..., None]
