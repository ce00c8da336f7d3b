"""Vision-language models: images, or sounds, as embeddings among those of a language model's tokens.

B rows, T tokens, D width
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from lit_alignment.checkpoints.export import ExportParts, media_parts
from lit_alignment.checkpoints.hf_folder import Form
from lit_alignment.checkpoints.restore import restore, restore_towers
from lit_alignment.checkpoints.saved import Saved
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.batching.collate import TargetBatch
from lit_alignment.data.multimodal.media import MediaTokens
from lit_alignment.data.vlm import MediaBatch, MediaItem, VLMDataModule
from lit_alignment.errors import ConfigError
from lit_alignment.generation.engine import EngineNeeds, Images, ItemRequests
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.head import base_model
from lit_alignment.models.loading import BackboneConfig, pinned
from lit_alignment.models.multimodal.modality import TOWERS, MediaShape, MediaTower, ModalityConfig, load_tower
from lit_alignment.models.multimodal.placing import Placement, placed
from lit_alignment.models.multimodal.reading import media_tokens
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from lit_alignment.modules.generative import only_response
from lit_alignment.modules.sft import SFTModule
from lit_alignment.optimization import OptimizerConfig


class VLMModule(SFTModule):
    """A language model that sees images, and may hear sounds, through encoders and projectors.

    The loss is that of SFTModule; placeholders are never trained on. The projector always learns, beside it what
    `train_language_model` and `train_encoder` say: the projector alone at first, then with adapters, or everything.

    Args:
        backbone: The pretrained language model.
        image: How images enter it.
        audio: How sounds enter it.
        train_language_model: Whether its adapters, or without any all its weights, learn.
        train_encoder: Whether the encoders learn.
        projector_learning_rate: Highest learning rate of the projectors; that of `optimizer` by default.
        encoder_learning_rate: Likewise of the encoders.
        peft: New adapters of the language model.
        adapter: An existing adapter, frozen or to be trained further.
        tokens: Special and new tokens; the placeholders are added.
        optimizer: Optimizer and schedule.
        label_smoothing: Probability spread evenly over the vocabulary, in training only.
        generation: Decoding configurations of `predict`, by name.

    Source: Liu et al. 2023, LLaVA (arXiv:2304.08485).
    """

    family = "media"
    title = "vision-language fine-tuning"
    data_classes = (VLMDataModule,)
    shares_batches = False
    beside = "encoders and projectors"

    def __init__(
        self,
        backbone: BackboneConfig,
        image: ModalityConfig | None = None,
        audio: ModalityConfig | None = None,
        train_language_model: bool = True,
        train_encoder: bool = False,
        projector_learning_rate: float | None = None,
        encoder_learning_rate: float | None = None,
        peft: PeftConfig | None = None,
        adapter: AdapterConfig | None = None,
        tokens: TokensConfig = TokensConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        label_smoothing: float = 0.0,
        generation: dict[str, DecodingConfig] | None = None,
    ) -> None:
        """Find the sizes of everything; the weights come in `configure_model`."""
        given = {"image": image, "audio": audio}
        self._check(given, train_encoder, peft)
        modalities = {name: modality for name, modality in given.items() if modality is not None}
        missing = {token: NewTokenConfig() for name, m in modalities.items() for token in m.new_tokens(name)}
        tokens = replace(tokens, new=missing | tokens.new)
        super().__init__(backbone, peft, adapter, tokens, optimizer, label_smoothing, 0.0, generation)
        self.shapes = {name: MediaShape(name, modality) for name, modality in modalities.items()}
        self.train_language_model, self.train_encoder = train_language_model, train_encoder
        self.projector_learning_rate, self.encoder_learning_rate = projector_learning_rate, encoder_learning_rate
        self.towers: nn.ModuleDict | None = None
        self._media_tokens: dict[str, MediaTokens] | None = None
        self._engine_encodes = False  # whether the engine that answers encodes images itself

    @staticmethod
    def _check(given: dict[str, ModalityConfig | None], train_encoder: bool, peft: PeftConfig | None) -> None:
        if not any(given.values()):
            raise ConfigError("VLMModule sees nothing: set model.image or model.audio.")
        cached = next((name for name, each in given.items() if each is not None and each.cache is not None), None)
        if train_encoder and cached is not None:
            raise ConfigError(
                f"model.train_encoder is true, but the features in model.{cached}.cache stay as they are. Remove one."
            )
        if peft is not None and peft.is_prompt_learning:
            raise ConfigError(
                f"model.peft: {type(peft).__name__} puts virtual tokens before the prompt, beside which images have no "
                "position. Use LoRA."
            )

    @classmethod
    def arguments_of(cls, saved: Saved) -> dict[str, Any]:
        """Also how media enter; files are read and encoded, whatever cache training has used."""
        trained = saved.networks.get(TOWERS, {})
        media: dict[str, Any] = {name: replace(each, cache=None) for name, each in saved.modalities.items()}
        encoder = any(f"{name}.encoders." in weight for name in media for weight in trained)
        own = {"train_language_model": not saved.frozen, "train_encoder": encoder}
        return {**super().arguments_of(saved), **own, **media}

    @property
    def media(self) -> dict[str, MediaTokens]:
        """Placeholder and reader by modality, for the data module."""
        if self._media_tokens is None:
            self._media_tokens = {name: media_tokens(shape, self.tokenizer) for name, shape in self.shapes.items()}
        return self._media_tokens

    @property
    def data(self) -> VLMDataModule:
        """The data module, which reads files."""
        return self.data_as(VLMDataModule)

    def data_arguments(self) -> dict[str, Any]:
        """Placeholders and readers of the media."""
        return {**super().data_arguments(), "media": self.media}

    def media_shapes(self) -> dict[str, MediaShape]:
        """The modalities."""
        return self.shapes

    # Models.

    def setup(self, stage: str) -> None:
        """Refuse a data module with other placeholders."""
        super().setup(stage)
        if self.data.media.keys() != self.shapes.keys():
            raise ConfigError("the data module has placeholders of another model: give it this module's `media`.")

    def load_extra_networks(self, device_type: str = "cpu") -> None:
        """Load encoders and projectors."""
        if not self.train_language_model:
            self.network.requires_grad_(False)
        self.load_towers(device_type)

    def extra_networks(self) -> dict[str, nn.Module]:
        """Encoders and projector of each modality."""
        return dict(self.loaded_towers)

    def export_parts(self, saved: Saved, network: nn.Module, form: Form) -> ExportParts:
        """A LLaVA if this is one, else the projectors beside the language model."""
        towers = restore_towers(saved, network).towers if self.is_sharded else self.loaded_towers
        template = datamodule_of(self.trainer).chat_template()
        parts = media_parts(
            self.shapes, towers, saved.networks.get(TOWERS, {}), network, self.tokenizer, template, form
        )
        return replace(parts, generation_config=super().export_parts(saved, network, form).generation_config)

    def load_towers(self, device_type: str = "cpu") -> nn.ModuleDict:
        """Load encoders and projectors without a Trainer, after the language model."""
        width = int(base_model(self.network).get_input_embeddings().weight.shape[1])
        self.towers = nn.ModuleDict(
            {name: load_tower(shape, width, self.train_encoder, device_type) for name, shape in self.shapes.items()}
        )
        return self.towers

    @property
    def loaded_towers(self) -> dict[str, MediaTower]:
        """Encoders and projector by modality.

        Raises:
            ConfigError: Before `configure_model`.
        """
        if self.towers is None:
            raise ConfigError("the encoders are not loaded yet: call configure_model() or run it in a Trainer.")
        return {name: tower for name, tower in self.towers.items() if isinstance(tower, MediaTower)}

    # Training.

    def _hidden_states(self, batch: TargetBatch) -> Tensor:
        """Hidden states that predict the targets, [N, D], with embeddings of the media at their placeholders."""
        media, positions = (batch.media, batch.placeholders) if isinstance(batch, MediaBatch) else ({}, {})
        with placed(self.network, self._placements(media, positions)):
            return super()._hidden_states(batch)

    def _placements(self, media: dict[str, list[Tensor]], positions: dict[str, Tensor]) -> list[Placement]:
        """What to put at the placeholders: one call of each encoder for the whole batch.

        Args:
            media: What the data module has read, by modality.
            positions: Of the placeholders, by modality; those that are missing are looked for.
        """
        found = []
        for name, tower in self.loaded_towers.items():
            token_id = self.media[name].token_id
            if name in media:
                found.append(Placement(token_id, tower(media[name]), positions=positions.get(name)))
            elif self._trainer is not None and self.trainer.world_size > 1:
                # Other ranks may have images: this one takes part in the exchange of gradients and of shards.
                nothing = [part.to(self.device) for part in self.shapes[name].nothing()]
                found.append(Placement(token_id, tower(nothing), absent=True))
        return found

    # Responses.

    @torch.no_grad()
    def item_requests(self, items: Sequence[MediaItem], decoding: DecodingConfig) -> list[ItemRequests]:
        """Prompts with the embeddings of their files, or with the files where the engine encodes images itself."""
        requests = [self.request(item.input_ids, decoding) for item in items]
        if self._engine_encodes:
            image, max_pixels = self.media["image"], self.shapes["image"].modality.max_pixels
            requests = [
                replace(each, images=Images(item.media["image"], image.token_id, image.number, max_pixels))
                if item.media.get("image")
                else each
                for each, item in zip(requests, items, strict=True)
            ]
        else:
            embeddings = self._embeddings(items)
            requests = [replace(each, embeddings=own) for each, own in zip(requests, embeddings, strict=True)]
        return [ItemRequests([each], only_response) for each in requests]

    def _embeddings(self, items: Sequence[MediaItem]) -> list[dict[int, Tensor]]:
        """What stands at the placeholders of each item: one call of each encoder for all of them."""
        owners = [(f"{item.dataset}/{item.id}", item.media) for item in items]
        media = {name: [part.to(self.device) for part in parts] for name, parts in self.data.load(owners).items()}
        found: list[dict[int, Tensor]] = [{} for _ in items]
        names = {self.media[name].token_id: name for name in self.loaded_towers}
        for placement in self._placements(media, {}):
            if placement.absent:
                continue
            counts = [len(item.media.get(names[placement.token_id], [])) for item in items]
            for own, part in zip(found, torch.split(placement.embeddings, counts), strict=True):
                if len(part):
                    own[placement.token_id] = part
        return found

    def prepare_for_engine(self, saved: Saved | None, folder: Path) -> EngineNeeds:
        """Nothing beside a LLaVA, which engines run whole; else language model, encoders and projectors.

        Raises:
            ConfigError: Before training.
        """
        if saved is None:
            raise ConfigError("the projector is not trained: give --ckpt_path.")
        if json.loads((folder / "config.json").read_text())["model_type"] == "llava":
            self._engine_encodes = True
            files = self.data.examples["predict"]["media"]
            return EngineNeeds(num_images=max(1, *(len(json.loads(each)["image"]) for each in files)))
        self.model, _ = restore(saved)
        self.load_towers().load_state_dict(saved.networks.get(TOWERS, {}), strict=False)
        self.eval()
        return EngineNeeds(embeddings=True, network=self.model)

    @property
    def never(self) -> list[int]:
        """Placeholders."""
        return [each.token_id for each in self.media.values()]

    # Optimizer and checkpoint.

    def other_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Those of the projectors and of the encoders."""
        rate = self.optimizer_config.learning_rate
        found = []
        for tower in self.loaded_towers.values():
            found.append((list(tower.projector.parameters()), self.projector_learning_rate or rate))
            found.append((list(tower.encoders.parameters()), self.encoder_learning_rate or rate))
        return found

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Also how media enter, and their sizes."""
        modalities = {}
        for name, shape in self.shapes.items():
            encoders = [pinned(encoder) for encoder in shape.modality.encoders]
            modalities[name] = asdict(replace(shape.modality, encoders=encoders))
        return {**super().checkpoint_metadata(), "modalities": modalities, "frozen": not self.train_language_model}
