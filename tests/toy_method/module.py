"""The LightningModule of the toy method."""

from peft import PeftConfig
from torch import Tensor
from torchmetrics import Metric

from lit_alignment import AdapterConfig, BackboneConfig, DecodingConfig, OptimizerConfig, TokensConfig
from lit_alignment.data.batching.collate import TargetBatch
from lit_alignment.hooks import Stage
from lit_alignment.metrics import TokenMean
from lit_alignment.models.logprobs import target_logps
from lit_alignment.modules.generative import GenerativeModule
from tests.toy_method.losses import focal_token_loss


class FocalModule(GenerativeModule):
    """Fine-tuning with the focal loss of each token."""

    def __init__(
        self,
        backbone: BackboneConfig,
        gamma: float = 2.0,
        peft: PeftConfig | None = None,
        adapter: AdapterConfig | None = None,
        tokens: TokensConfig = TokensConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        generation: dict[str, DecodingConfig] | None = None,
    ) -> None:
        """Keep the settings; the weights come in `configure_model`."""
        super().__init__(backbone, peft, adapter, tokens, optimizer, generation)
        self.gamma = gamma

    def stage_metrics(self) -> dict[str, Metric]:
        """The mean over trained tokens."""
        return {"loss": TokenMean()}

    def step(self, batch: TargetBatch, stage: Stage) -> Tensor:
        """Weighted sum of the tokens' losses."""
        loss_sum = (focal_token_loss(target_logps(self.network, batch), self.gamma) * batch.weights).sum()
        if stage == "train":
            return self.step_loss(loss_sum, batch.window_weight)
        self.metrics_of(stage)["loss"].update(loss_sum, batch.weights.sum())
        return loss_sum
