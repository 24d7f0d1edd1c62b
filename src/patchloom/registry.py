"""What there is, by name: methods, data sources, published systems. Nothing of it is loaded before it is used.

The command line, the Python API and tab completion read these tables; a new method is an entry here.

>>> sorted(METHODS["pretrain"])[:2]
['beit', 'ccvit']
>>> settings_class("evaluate", "knn").__name__
'KNNConfig'
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from patchloom.errors import unknown_name


class Entry(NamedTuple):
    """One method: where its class lives, where its settings live (light to import), and what it does."""

    method: str
    settings: str
    summary: str

    @property
    def sentence(self) -> str:
        """The summary with its full stop, unless it asks something; also the first line of the class."""
        return self.summary if self.summary.endswith("?") else f"{self.summary}."


METHODS: dict[str, dict[str, Entry]] = {
    "pretrain": {
        "ccvit": Entry(
            "systems.ccvit.method:CCViTMethod",
            "systems.ccvit.config:CCViTConfig",
            "Masked image modelling against a k-means codebook of patches (CCViT)",
        ),
        "beit": Entry(
            "systems.beit.method:BEiTMethod",
            "systems.beit.config:BEiTConfig",
            "Masked image modelling against the tokens of any tokenizer (BEiT; preset of BEiT v2)",
        ),
        "dinov2": Entry(
            "systems.dinov2.method:Dinov2Method",
            "systems.dinov2.config:Dinov2Config",
            "Self-distillation with crops and hidden patches (DINOv2; presets of RAD-DINO and Phikon-v2)",
        ),
        "tov_vicreg": Entry(
            "systems.tov_vicreg.method:TOVVICRegMethod",
            "systems.tov_vicreg.config:TOVVICRegConfig",
            "VICReg on stacks of frames with temporal order verification (TOV-VICReg)",
        ),
        "mae": Entry(
            "systems.mae.method:MAEMethod",
            "systems.mae.config:MAEConfig",
            "Reconstruction of hidden patches from the visible ones (MAE)",
        ),
        "videomae_v2": Entry(
            "systems.videomae_v2.method:VideoMAEV2Method",
            "systems.videomae_v2.config:VideoMAEV2Config",
            "Reconstruction of hidden tubes of clips by a decoder of some of them (VideoMAE V2)",
        ),
        "hi_end_mae": Entry(
            "systems.hi_end_mae.method:HiEndMAEMethod",
            "systems.hi_end_mae.config:HiEndMAEConfig",
            "Reconstruction of hidden patches of volumes by a decoder that asks the encoder's layers (Hi-End-MAE)",
        ),
    },
    "adapt": {
        "finetune": Entry(
            "systems.finetune.method:FinetuneMethod",
            "systems.finetune.config:FinetuneConfig",
            "End-to-end fine-tuning of all weights for classification",
        ),
        "scratch": Entry(
            "systems.scratch.method:ScratchMethod",
            "systems.scratch.config:ScratchConfig",
            "Supervised training of any timm model from fresh weights",
        ),
        "linear": Entry(
            "systems.linear.method:LinearMethod",
            "systems.linear.config:LinearConfig",
            "A linear classifier on the frozen encoder, trained on augmented images",
        ),
        "bitfit": Entry(
            "systems.bitfit.method:BitFitMethod",
            "systems.bitfit.config:BitFitConfig",
            "BitFit: the encoder's biases and a classifier",
        ),
        "lora": Entry(
            "systems.lora.method:LoRAMethod",
            "systems.lora.config:LoRAConfig",
            "LoRA: low-rank updates of the frozen encoder's linear layers (extra: lora)",
        ),
        "vpt": Entry(
            "systems.vpt.method:VPTMethod",
            "systems.vpt.config:VPTConfig",
            "Visual prompt tuning: learnt tokens in front of the frozen encoder's own",
        ),
        "adaptformer": Entry(
            "systems.adaptformer.method:AdaptFormerMethod",
            "systems.adaptformer.config:AdaptFormerConfig",
            "AdaptFormer: a narrow two-layer branch beside every MLP of the frozen encoder",
        ),
        "dvpt": Entry(
            "systems.dvpt.method:DVPTMethod",
            "systems.dvpt.config:DVPTConfig",
            "DVPT: prompts that read the image, and narrow bottlenecks shared by neighbouring blocks",
        ),
        "prompt_cam": Entry(
            "systems.prompt_cam.method:PromptCAMMethod",
            "systems.prompt_cam.config:PromptCAMConfig",
            "Prompt-CAM: a prompt per class in a frozen encoder, whose attention shows what was decided by",
        ),
        "gcab": Entry(
            "systems.gcab.method:GCABMethod",
            "systems.gcab.config:GCABConfig",
            "GCAB: classes learnt task after task, without forgetting and without keeping old images",
        ),
    },
    "distill": {
        "logits": Entry(
            "systems.logits.method:LogitsMethod",
            "systems.logits.config:LogitsConfig",
            "Any student learns the answers of any teacher of the same classes, beside the labels",
        ),
        "scalekd": Entry(
            "systems.scalekd.method:ScaleKDMethod",
            "systems.scalekd.config:ScaleKDConfig",
            "Any student learns from a strong vision transformer by three aligned views of its features",
        ),
        "deit_lt": Entry(
            "systems.deit_lt.method:DeiTLTMethod",
            "systems.deit_lt.config:DeiTLTConfig",
            "A ViT with a token for the labels and one for a CNN, which is asked about the student's own strong views",
        ),
        "g2sd_generic": Entry(
            "systems.g2sd.generic_method:G2SDGenericMethod",
            "systems.g2sd.generic_config:G2SDGenericConfig",
            "A small masked autoencoder learns what a large one's decoder holds, without labels (G2SD, first stage)",
        ),
        "g2sd_specific": Entry(
            "systems.g2sd.specific_method:G2SDSpecificMethod",
            "systems.g2sd.specific_config:G2SDSpecificConfig",
            "A classifier learns from labels and a fine-tuned teacher, each on a token of its own (G2SD, second stage)",
        ),
    },
    "align": {
        "clip": Entry(
            "systems.clip.method:ClipMethod",
            "systems.clip.config:ClipConfig",
            "Images and captions meet in one space (CLIP); one tower may be locked (extra: clip)",
        ),
        "vit_lens": Entry(
            "systems.vit_lens.method:VitLensMethod",
            "systems.vit_lens.config:VitLensConfig",
            "Clouds or sounds through a lens into a frozen ViT, beside images and texts (ViT-Lens; extra: clip)",
        ),
    },
    "tokenize train": {
        "vit_vqgan": Entry(
            "systems.vit_vqgan.method:ViTVQGANMethod",
            "systems.vit_vqgan.config:ViTVQGANConfig",
            "A tokenizer that is learned: a ViT to codes of a table, another back, against a discriminator (ViT-VQGAN)",
        ),
        "vq_kd": Entry(
            "systems.beit.vq_kd_method:VQKDMethod",
            "systems.beit.vq_kd_config:VQKDConfig",
            "A tokenizer that is learned: codes of patches that say what a teacher's features of them are (VQ-KD)",
        ),
    },
    "generate": {
        "vim": Entry(
            "systems.vim.method:VIMMethod",
            "systems.vim.config:VIMConfig",
            "Images made token by token: a causal transformer over the tokens of any tokenizer (VIM)",
        ),
    },
    "segment": {
        "linear": Entry(
            "segment.method:LinearMethod",
            "segment.segment_config:SegmentConfig",
            "1x1 convolution on the last block's map",
        ),
        "bn": Entry(
            "segment.method:BatchNormMethod",
            "segment.segment_config:SegmentConfig",
            "BatchNorm and 1x1 convolution: DINOv2's linear evaluation",
        ),
        "dinov3": Entry(
            "segment.method:DINOv3Method",
            "segment.segment_config:SegmentConfig",
            "Dropout, BatchNorm and 1x1 convolution: DINOv3's",
        ),
        "multilayer": Entry(
            "segment.method:MultiLayerMethod",
            "segment.segment_config:SegmentConfig",
            "bn on the maps of four blocks",
        ),
        "upernet": Entry(
            "segment.method:UPerNetMethod",
            "segment.segment_config:UPerNetConfig",
            "BEiT's neck, UPerNet and its auxiliary head",
        ),
        "setr": Entry(
            "segment.method:SETRMethod",
            "segment.segment_config:SegmentConfig",
            "SETR's progressive upsampling",
        ),
        "unet": Entry(
            "segment.method:UNetMethod",
            "segment.segment_config:SegmentConfig",
            "The radiology benchmark's, shaped like the upper half of a U-Net",
        ),
        "vit_comer": Entry(
            "systems.vit_comer.method:ViTCoMerMethod",
            "systems.vit_comer.config:ViTCoMerConfig",
            "A CNN beside the encoder, which trains along, and UPerNet on the pyramid of both (ViT-CoMer)",
        ),
        "point": Entry(
            "systems.vit_p.method:PointMethod",
            "systems.vit_p.config:PointConfig",
            "A ViT classifies masks, which others draw, at their points (ViT-P)",
        ),
        "unetr": Entry(
            "segment.volume_method:UNETRMethod",
            "segment.volume_config:UNETRConfig",
            "A U-Net on the blocks of an encoder of volumes: a class for every voxel (extra: medical)",
        ),
    },
    "detect": {
        "vit_comer": Entry(
            "systems.vit_comer.detect_method:DetectMethod",
            "systems.vit_comer.detect_config:DetectConfig",
            "Mask R-CNN finds objects on the pyramid of an encoder and a CNN beside it (ViT-CoMer; extra: detection)",
        ),
    },
    "clean": {
        "diagnose": Entry(
            "evaluate.artefacts:Diagnose",
            "evaluate.artefacts_config:ArtefactsConfig",
            "Patterns of place, outlying norms and features of nothing: is cleaning an encoder worth trying?",
        ),
        "ph_reg": Entry(
            "systems.ph_reg.method:PHRegMethod",
            "systems.ph_reg.config:PHRegConfig",
            "An encoder with fresh registers learns what it says on average over shifted views: features without "
            "artefacts",
        ),
        "dvt_train": Entry(
            "systems.dvt.method:DVTTrainMethod",
            "systems.dvt.config:DVTTrainConfig",
            "A transformer block learns to take the artefacts out of an encoder's features (DVT, second stage)",
        ),
        "dvt_distill": Entry(
            "systems.dvt.distill_method:DVTDistillMethod",
            "systems.dvt.config:DVTDistillConfig",
            "An encoder learns what its denoiser makes of it, and needs none any more (DVT, third stage)",
        ),
    },
    "evaluate": {
        "caption_retrieval": Entry(
            "evaluate.words:CaptionRetrieval",
            "evaluate.words_config:CaptionRetrievalConfig",
            "How often an image finds its caption, and a caption its image; needs towers of align clip (extra: clip)",
        ),
        "classifier": Entry(
            "evaluate.classifier:Classifier",
            "evaluate.classifier_config:ClassifierConfig",
            "A trained classifier as it stands, on test; answers may be averaged over clips and crops of a video",
        ),
        "compare": Entry(
            "evaluate.compare:Compare",
            "evaluate.compare_config:ComparisonConfig",
            "Paired difference of two or more encoders on the same images, with interval and p-value",
        ),
        "few_shot": Entry(
            "evaluate.few_shot:FewShot",
            "evaluate.few_shot_config:FewShotConfig",
            "Episodes of a few classes with a few images each; nearest class mean and logistic regression",
        ),
        "finetune": Entry(
            "evaluate.finetune:Finetune",
            "evaluate.finetune_config:FinetuneEvaluationConfig",
            "Train the encoder further on train by a method of patchloom adapt, and measure the classifier on test",
        ),
        "health": Entry(
            "evaluate.health:Health",
            "evaluate.health_config:HealthConfig",
            "Rank, alignment, uniformity, attention, outlier tokens, position leakage and a probe of every layer",
        ),
        "knn": Entry(
            "evaluate.knn:KNN",
            "evaluate.knn_config:KNNConfig",
            "Vote of the nearest training images by cosine similarity; each image by all others where train is test",
        ),
        "linear": Entry(
            "evaluate.linear:Linear",
            "evaluate.linear_config:LinearProbeConfig",
            "Logistic regression on standardised frozen features; the penalty is chosen on training images only",
        ),
        "linear_grid": Entry(
            "evaluate.linear_grid:LinearGrid",
            "evaluate.linear_grid_config:LinearGridConfig",
            "DINOv2's linear probe: rates, blocks and poolings in one pass, the best on validation images counts",
        ),
        "logistic": Entry(
            "evaluate.logistic_sweep:Logistic",
            "evaluate.logistic_config:LogisticConfig",
            "Logistic regression on frozen features as they are, with the penalty that does best on validation images",
        ),
        "multilabel": Entry(
            "evaluate.multilabel:MultiLabel",
            "evaluate.multilabel_config:MultiLabelConfig",
            "Mean AUROC over labels of which an image may have several; unknown labels are left out",
        ),
        "ordinal": Entry(
            "evaluate.ordinal:Ordinal",
            "evaluate.ordinal_config:OrdinalConfig",
            "Logistic regression on frozen features, scored by quadratic kappa: a wrong grade counts by its distance",
        ),
        "retrieval": Entry(
            "evaluate.retrieval:Retrieval",
            "evaluate.retrieval_config:RetrievalConfig",
            "Mean average precision and recall of looking for images of the same class; train is the collection",
        ),
        "rl": Entry(
            "evaluate.rl:RL",
            "evaluate.rl_config:RLConfig",
            "Score of an agent that learns a game through the encoder, data-efficiently",
        ),
        "segmentation": Entry(
            "evaluate.segmentation:Segmentation",
            "evaluate.segmentation_config:SegmentationConfig",
            "Decoder on the maps of a frozen encoder: a class for every pixel, mean IoU",
        ),
        "slides": Entry(
            "evaluate.slides.protocol:Slides",
            "evaluate.slides.config:SlidesConfig",
            "Multiple-instance learning on the tiles of whole slides: cross-validated, ensembled, tested elsewhere",
        ),
        "volume_segmentation": Entry(
            "evaluate.volume_segmentation:VolumeSegmentation",
            "evaluate.volume_segmentation_config:VolumeSegmentationConfig",
            "Decoder on the slices of volumes: Dice per volume and 95 % Hausdorff distance",
        ),
        "volumes": Entry(
            "evaluate.volumes:Volumes",
            "evaluate.volumes_config:VolumesConfig",
            "Volumes sorted into classes by their slices: mean, maximum or attention over slice features",
        ),
        "zero_shot": Entry(
            "evaluate.words:ZeroShot",
            "evaluate.words_config:ZeroShotConfig",
            "Classes named by sentences, without any training on them; needs towers of align clip (extra: clip)",
        ),
    },
    "attack": {
        "dta": Entry(
            "attack.transfer:TransferAttack",
            "systems.dta.config:DTAConfig",
            "Downstream Transfer Attack: how far what is made from a public encoder is fooled through it",
        ),
    },
    "anomaly": {
        "ear": Entry(
            "systems.ear.method:EARMethod",
            "systems.ear.config:EARConfig",
            "What stands out is excised and repaired; where the repair differs there is a defect (EAR)",
        ),
    },
    "explain": {
        "attention": Entry(
            "explain.commands:AttentionGallery",
            "explain.commands_config:AttentionConfig",
            "Where the encoder looks: heads of a block, rollout and, for classifiers, maps weighted by gradients",
        ),
        "compare": Entry(
            "explain.commands:CompareGallery",
            "explain.commands_config:CompareConfig",
            "Several explanations side by side, with their insertion and deletion scores",
        ),
        "prompt_cam": Entry(
            "explain.commands:TraitsGallery",
            "explain.commands_config:TraitsConfig",
            "What a Prompt-CAM model decided by: the heads that matter for an image, or for one class against another",
        ),
    },
}
"""The methods of each verb, of one word or two. Places are `module:name` within this package."""

SOURCES: dict[str, str] = {
    "photos": "crops of photographs that ship inside scikit-image and scikit-learn; photos:test",
    "digits": "scikit-learn's 8x8 digits; digits:test",
    "shapes3d": "small volumes of three kinds of ellipsoids in noise, with a class and a mask; shapes3d:test",
    "shapes": "clouds of 18 sorts of shapes, and :test, :unseen, :views, :views_test (extra: points)",
    "FOLDER": "a folder of images, at any depth; top-level sub-folders are classes",
    "FILE.csv": "images, labels, masks, captions by a table (or .parquet): file,label,mask,caption; FILE.csv:SPLIT",
    "NAME-{000000..000099}.tar": "WebDataset shards, streamed (extra: shards)",
    "torchvision:NAME": "a set of torchvision, fetched on first use; torchvision:NAME:test",
    "frames:FOLDER": "recordings, .npy arrays or image sequences in time order; in_chans frames make an image",
    "clips:FOLDER": "videos (MP4, WebM, GIF, AVI, folders of frames); also clips:FILE.csv, clips:X.tar (extra: video)",
    "moving": "clips of the photographs moved, zoomed and turned; the class is the motion; moving:test",
    "volumes:FOLDER": "volumes (NIfTI, DICOM, .npy), with a class or a mask each or with neither (extra: medical)",
    "points:FOLDER": "point clouds and meshes (PLY, OFF, OBJ, STL, NPZ, .npy), pictures beside (extra: points)",
    "audio:FOLDER": "sounds (WAV, FLAC, OGG, MP3) or spectrograms (.npy), likewise (extra: audio)",
    "atari:GAME,GAME": "games played at random, recorded on first use (extra: rl); atari:Pong@3000:test",
    "hf:NAME": "a set of the Hugging Face hub (extra: hf); hf:NAME:SPLIT",
    "chestxray14:FOLDER": "NIH ChestX-ray14, 14 labels; …:train, :val, :test",
    "chexpert:FOLDER": "CheXpert, 5 labels; …:train, :val, :test, and :ones, :zeros, :ignore for uncertain",
    "mimic-cxr:FOLDER": "MIMIC-CXR, 5 labels; …:train, :val, :test",
    "covidx:FOLDER": "COVIDx, 3 classes; …:train, :val, :test",
}
"""Ways to name a data source, each with one line of help."""

OPENERS: dict[str, str] = {
    "audio": "data.sounds:SoundSource",
    "clips": "data.clips:open_clips",
    "points": "data.clouds:CloudSource",
    "volumes": "data.volumes:open_samples",
}
"""What opens `WORD:PATH`, by word: called with the path, and with those of `labels`, `in_chans`, the source options and
what the model's bundle remembers of them that it has arguments for."""

DECODERS: dict[str, str] = {
    "unetr": "segment.unetr:build",
    "vit_comer": "systems.vit_comer.parts:build",
}
"""Decoders of `segment` that are systems of their own: what makes the parts of such a model (`segment.build`)."""

REFERENCES: dict[str, str] = {
    "adaptformer": "systems.adaptformer.published:load",
    "beit": "systems.beit.published:load",
    "beitv2": "systems.beit.published:load",
    "vq_kd": "systems.beit.published:load_vq_kd",
    "vqkd": "systems.beit.published:load_vq_kd",
    "ccvit": "systems.ccvit.published:load",
    "dinov2": "systems.dinov2.published:load",
    "rad_dino": "systems.dinov2.published:load_rad_dino",
    "mae": "systems.mae.published:load",
    "thorax_mae": "systems.thorax_mae.published:load",
    "prompt_cam": "systems.prompt_cam.published:load",
    "phikon_v2": "systems.phikon_v2.published:load",
    "tov_vicreg": "systems.tov_vicreg.published:load",
    "meanpool": "systems.phikon_v2.published:load_meanpool",
    "abmil": "systems.phikon_v2.published:load_abmil",
    "chowder": "systems.phikon_v2.published:load_chowder",
    "dsmil": "systems.phikon_v2.published:load_dsmil",
    "transmil": "systems.phikon_v2.published:load_transmil",
    "hiptmil": "systems.phikon_v2.published:load_hiptmil",
    "deit_lt": "systems.deit_lt.published:load",
    "g2sd": "systems.g2sd.published:load",
    "scalekd": "systems.scalekd.published:load",
    "segmentation_heads": "systems.segmentation_heads.published:load",
    "upernet": "systems.segmentation_heads.published:load",
    "dinov2_radiology": "systems.dinov2_radiology.published:load",
    "dinov3": "systems.dinov3.published:load",
    "dvpt": "systems.dvpt.published:load",
    "dinov3_medical": "systems.dinov3.published:load",
    "gcab": "systems.gcab.published:load",
    "ear": "systems.ear.published:load",
    "hi_end_mae": "systems.hi_end_mae.published:load",
    "hyena_nd": "systems.hyena_nd.published:load",
    "vit_comer": "systems.vit_comer.published:load",
    "vitamin": "systems.vitamin.published:load",
    "vit_vqgan": "systems.vit_vqgan.published:load",
    "vit_lens": "systems.vit_lens.published:load",
    "vit_p": "systems.vit_p.published:load",
    "videomae_v2": "systems.videomae_v2.published:load",
    "ph_reg": "systems.ph_reg.published:load",
    "dvt": "systems.dvt.published:load",
}
"""Loaders of published checkpoints."""


MODELS: dict[str, str] = {
    "gcab.json": "systems.gcab.saved:load_tasks",
    "tokenizer.json": "tokenizers.tokenizer:open_tokenizer",
    "dense_clip.json": "systems.ph_reg.saved:load_dense",
    "vim.json": "systems.vim.saved:load_vim",
    "point.json": "systems.vit_p.saved:load_points",
    "vit_lens.json": "systems.vit_lens.saved:load_lens",
    "detector.json": "systems.vit_comer.detect_saved:load_detector",
}
"""What opens a model that is more than the encoder of its bundle, by the file in the bundle that tells of it."""


TOKENIZERS: dict[str, str] = {
    "vit_vqgan": "systems.vit_vqgan.saved:load_tokenizer",
    "vq_kd": "systems.beit.saved:load_tokenizer",
}
"""What opens the folder of a learned tokenizer, by the `kind` in its `tokenizer.json`."""

ENCODERS: dict[str, str] = {"denoiser.json": "systems.dvt.saved:load_denoised"}
"""What opens an encoder that is no bundle of its own, by the file in a folder that tells of it."""

SEGMENTERS: dict[str, str] = {"point.json": "systems.vit_p.saved:load_points"}
"""What opens a segmentation model that is no decoder of an encoder's maps, by its file in the bundle: called with the
path, it gives a module with `encoder`, `segment`, `predict`, `class_names` and `palette` (`segment.predict`)."""


def load(place: str) -> Any:
    """Import what stands at a place, `module:name` within this package."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"patchloom.{module}"), name)


def entry(verb: str, name: str) -> Entry:
    """Return the entry of a method.

    Raises:
        UsageError: There is no such verb or method; names the nearest.
    """
    if verb not in METHODS:
        raise unknown_name("verb", verb, METHODS)
    if name not in METHODS[verb]:
        kind = {"evaluate": "evaluation", "explain": "explanation"}.get(verb, f"{verb} method")
        raise unknown_name(kind, name, METHODS[verb])
    return METHODS[verb][name]


def method_class(verb: str, name: str) -> Any:
    """Return the class of a method, see `entry`."""
    return load(entry(verb, name).method)


def taking(kind: str) -> list[str]:
    """Return the methods that take samples of a kind, as `verb name`; imports them all, so it is for error messages."""
    found = []
    for verb, entries in METHODS.items():
        for name in entries:
            try:
                kinds = getattr(method_class(verb, name), "kinds", ())
            except ImportError:  # of an extra that is not here
                continue
            found += [f"{verb} {name}"] if kind in kinds else []
    return found


def settings_class(verb: str, name: str) -> Any:
    """Return the settings class of a method, see `entry`."""
    return load(entry(verb, name).settings)
