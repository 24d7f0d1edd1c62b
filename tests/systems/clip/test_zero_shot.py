"""Classes by sentences, and recall of retrieval, by definitions written out."""

import pytest
import timm
import torch
import torch.nn.functional as F

pytest.importorskip("open_clip")

import open_clip

from patchloom.errors import UsageError
from patchloom.systems.clip.model import CLIP
from patchloom.systems.clip.text import TextTower
from patchloom.systems.clip.zero_shot import ZeroShotClassifier, class_features, retrieval, zero_shot_accuracy

NAMES, TEMPLATES = ["cat", "fire_truck", "dog"], ("a photo of a {}.", "a drawing of the {}.")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    trunk = timm.create_model("vitamin_tiny_32", num_classes=0)
    return CLIP(trunk, TextTower(context_length=16, width=32, heads=2, layers=1, output_dim=16)).eval()


def test_a_class_is_the_mean_of_its_sentences_as_in_open_clip(model):
    spoken = [name.replace("_", " ") for name in NAMES]
    reference = open_clip.build_zero_shot_classifier(
        model,
        lambda texts: open_clip.SimpleTokenizer(context_length=16)(texts),
        spoken,
        [lambda name, t=template: t.format(name) for template in TEMPLATES],
    )
    torch.testing.assert_close(class_features(model, NAMES, TEMPLATES), reference.T, atol=1e-6, rtol=0)


def test_a_classifier_names_images_of_any_size(model):
    classifier = ZeroShotClassifier(model, NAMES, TEMPLATES)
    named = classifier.predict(torch.randint(0, 256, (4, 3, 50, 40), dtype=torch.uint8))
    assert set(named) <= set(NAMES)
    assert len(named) == 4
    with pytest.raises(UsageError, match=r"a template has \{\}"):
        ZeroShotClassifier(model, NAMES, ("a photo",))


def test_accuracy_counts_the_first_and_the_first_five():
    classes = torch.eye(6)
    images = F.normalize(torch.tensor([[3.0, 2, 1, 0.5, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]), dim=1)
    accuracy = zero_shot_accuracy(images, classes, torch.tensor([0, 0]))
    assert accuracy.top1 == 0.5
    assert accuracy.top5 == 0.5
    assert zero_shot_accuracy(images, classes, torch.tensor([1, 1])).top5 == 1.0


@pytest.mark.parametrize("duplicates", [False, True])
def test_recall_is_its_definition(duplicates):
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(12, 4, generator=generator), dim=1)
    owners = torch.tensor([0, 0, 1, 2, 2, 2, *range(3, 12)])
    texts = F.normalize(torch.randn(len(owners), 4, generator=generator), dim=1)
    same = torch.arange(len(owners))
    if duplicates:
        same[7], texts[7] = same[2], texts[2]
        same[9], texts[9] = same[4], texts[4]
    found = retrieval(images, texts, owners, same if duplicates else None)
    for rank in (1, 5, 10):
        hits = 0
        for image in range(12):
            distinct = {}
            for number in sorted(range(len(owners)), key=lambda n: -float(images[image] @ texts[n])):
                distinct.setdefault(int(same[number]), number)
            own = {int(same[n]) for n in range(len(owners)) if owners[n] == image}
            hits += bool(own & set(list(distinct)[:rank]))
        assert found[f"image_to_text_r{rank}"] == pytest.approx(hits / 12)
        hits = 0
        for text in range(len(owners)):
            nearest = (images @ texts[text]).argsort(descending=True)[:rank].tolist()
            right = {int(owners[n]) for n in range(len(owners)) if same[n] == same[text]}
            hits += bool(right & set(nearest))
        assert found[f"text_to_image_r{rank}"] == pytest.approx(hits / len(owners))
    parts = [value for name, value in found.items() if name != "retrieval_mean_recall"]
    assert found["retrieval_mean_recall"] == pytest.approx(sum(parts) / 6)
