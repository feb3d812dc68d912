"""CUB-200-2011, and Waterbirds made of the same birds."""

import numpy as np

from tests.layouts import pictures
from vitssl.data.sources import waterbirds as source

CLASSES = {  # number: name; the first two live on water
    1: "Black_footed_Albatross",
    2: "Laysan_Albatross",
    4: "Groove_billed_Ani",
    9: "Brewer_Blackbird",
}
PARTS = (
    "back, beak, belly, breast, crown, forehead, left eye, left leg, left wing, nape, "
    "right eye, right leg, right wing, tail, throat"
).split(", ")
EACH = 12  # Birds of a class; the first eight of them train.


def every(each=EACH):
    """Return [(number of the class, which of its birds)]."""
    return [(c, i) for c in CLASSES for i in range(each)]


def file(c, i):
    """Return the path of bird i of class c."""
    return f"{c:03d}.{CLASSES[c]}/{CLASSES[c]}_{i + 1:04d}_{796000 + 100 * c + i}.jpg"


def keypoints(c, i):
    """Return [(x, y, visible)] of the 15 parts; one in four is hidden."""
    x, y, w, h = pictures.thing(c, i).box
    points = []
    for k in range(len(PARTS)):
        at = (x + (k % 5 + 0.5) * w / 5, y + (k // 5 + 0.5) * h / 3)
        hidden = (i + k) % 4 == 3
        points.append((0.0, 0.0, 0) if hidden else (*np.round(at, 1).tolist(), 1))
    return points


def cub(root, birds=(), *, train=lambda i: i < 8, masks=None):
    """Write CUB_200_2011.

    Args:
        birds: [(number of the class, which of its birds)]; () = 12 of each class.
        train: tells of a bird's number whether it is in the training split.
        masks: how many of the birds have a segmentation; None = all.
    """
    base, birds = root / "CUB_200_2011", list(birds) or every()
    for k, (c, i) in enumerate(birds):
        picture = pictures.thing(c, i)
        pictures.save(base / "images" / file(c, i), picture.image)
        if masks is None or k < masks:
            x = picture.box[0]
            # Five people drew the outlines: a pixel that one of them took is 51.
            picture.mask[:, x] //= 5
            path = (base / "segmentations" / file(c, i)).with_suffix(".png")
            pictures.save(path, picture.mask)
    rows = {
        "images.txt": [file(c, i) for c, i in birds],
        "image_class_labels.txt": [c for c, _ in birds],
        "train_test_split.txt": [int(train(i)) for _, i in birds],
        "bounding_boxes.txt": [
            " ".join(f"{v:.1f}" for v in pictures.thing(c, i).box) for c, i in birds
        ],
    }
    for name, values in rows.items():
        pictures.text(base / name, [f"{k} {v}" for k, v in enumerate(values, 1)])
    names = [f"{c} {c:03d}.{name}" for c, name in CLASSES.items()]
    pictures.text(base / "classes.txt", names)
    parts = [f"{k} {name}" for k, name in enumerate(PARTS, 1)]
    pictures.text(base / "parts" / "parts.txt", parts)
    places = [
        f"{k} {part} {x} {y} {seen}"
        for k, (c, i) in enumerate(birds, 1)
        for part, (x, y, seen) in enumerate(keypoints(c, i), 1)
    ]
    pictures.text(base / "parts" / "part_locs.txt", places)
    return base


def waterbirds(root):
    """Write waterbird_complete95_forest2water2: 24, 12 and 12 birds.

    Of each class the first six train, the next three validate; some of either kind are
    away from home in every split.
    """
    base = root / source.FOLDER
    rows = []
    for k, (c, i) in enumerate(every(), 1):
        y, split = int(c < 3), 0 if i < 6 else 1 if i < 9 else 2
        place = 1 - y if i in (4, 5, 7, 10, 11) else y
        behind = (pictures.LAND, pictures.WATER)[place]
        pictures.save(base / file(c, i), pictures.thing(c, i, place=behind).image)
        scene = ("/b/bamboo_forest", "/o/ocean")[place] + f"/{k:08d}.jpg"
        rows.append(f"{k},{file(c, i)},{y},{split},{place},{scene}")
    head = "img_id,img_filename,y,split,place,place_filename"
    pictures.text(base / "metadata.csv", [head, *rows])
    return base
