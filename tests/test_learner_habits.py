"What fastai's and Lightning's users do with a learner, on networks of ours and of others"
import copy
import json
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from conftest import root
from fastai.callback.mixup import CutMix, MixUp
from fastai.interpret import Interpretation
from fastai.learner import Learner, load_learner
from fastcore.basics import noop
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn
from torchvision.models import segmentation as tv

from noisyseg.data.datasets import scenes
from noisyseg.data.own import custom_masks
from noisyseg.data.loaders import mask_dataloaders
from noisyseg.data.procedural import scene, scene_classes, scene_palette
from noisyseg.measure.inference import evaluate, predict_mask
from noisyseg.nets.unet3plus import unet3plus_tiny
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.show.explorer import NoiseExplorer
from noisyseg.train.checkpoints import load_model, save_model
from noisyseg.train.learner import segmentation_learner

matplotlib.use('agg')
law = MaxGaussian(0.05)
image = scene(np.random.default_rng(5), 48)[0]


def one_channel(): return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))

def lraspp(n): return tv.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=n)

@pytest.fixture(scope='module')
def painted(tmp_path_factory):
    "Images of 40x40, with masks of a paint tool"
    folder = tmp_path_factory.mktemp('painted')
    for kind in ('images', 'masks'): (folder/kind).mkdir()
    for i in range(6):
        x, y = scene(np.random.default_rng(i), 40)
        Image.fromarray(x).save(folder/'images'/f'{i}.png')
        Image.fromarray(255*(y > 0).astype(np.uint8)).save(folder/'masks'/f'{i}.png')
    return folder

@pytest.fixture(params=['ours', 'torchvision', 'one channel'], scope='module')
def learn(request, painted, tmp_path_factory):
    "A learner that was trained under noise"
    if request.param == 'one channel':
        dls = custom_masks(painted/'images', painted/'masks', ['ground', 'thing'], codes={0: 0, 255: 1}, size=32, bs=2,
                           valid=0.5, seed=0)
    else: dls = scenes(n_train=4, n_valid=3, size=32, bs=2, seed=0)
    net = {'ours': unet3plus_tiny(7), 'torchvision': lraspp(7), 'one channel': one_channel()}[request.param]
    learn = segmentation_learner(dls, net, law, path=tmp_path_factory.mktemp('learn'))
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(1, 1e-3)
    yield learn
    plt.close('all')


def channels(learn): return 1 if isinstance(learn.model, nn.Sequential) else 7


def decided(p): return p.argmax(0) if len(p) > 1 else p[0] > 0.5


def test_predict_takes_what_people_have(learn, tmp_path):
    "An image as a file, a PIL image, an array, or an item of the set: the same mask, and no warning"
    Image.fromarray(image).save(tmp_path/'a.png')
    learn.validate()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = [learn.predict(i) for i in (tmp_path/'a.png', str(tmp_path/'a.png'), Image.fromarray(image), image)]
        own = learn.predict(learn.dls.valid_ds.items[1])
    for mask, labels, p in found:
        assert torch.equal(p, found[0][2]) and p.shape == (channels(learn), 32, 32) and 0 <= p.min() <= p.max() <= 1
        assert torch.equal(labels, decided(p)) and torch.equal(mask.as_subclass(torch.Tensor), labels.long())
    torch.testing.assert_close(own[2], learn.get_preds()[0][1])


def test_a_test_loader_has_no_masks(learn):
    "dls.test_dl: images alone, or with their masks where the items have them"
    alone = learn.dls.test_dl([image]*3)
    assert [len(b) for b in alone] == [1, 1] and learn.get_preds(dl=alone)[1] is None
    items = learn.dls.valid_ds.items
    preds, masks = learn.get_preds(dl=learn.dls.test_dl(items[:2], with_labels=True))
    for a, b in zip((preds, masks), learn.get_preds()): torch.testing.assert_close(a, b[:2])
    alone.show_batch()
    with pytest.raises(TypeError, match=r'test_dl\(\[image\]\)'): learn.dls.test_dl(image)


def test_tta_puts_views_back(learn):
    "The mean of an image's and its mirror image's masks; and a network that sees no difference is not changed by views"
    probs, masks = learn.tta()
    plain = learn.get_preds()
    x = learn.dls.valid.one_batch()[0]
    with torch.no_grad():
        out = learn.model(x.flip(-1))
        mirrored = learn.loss_func.activation(out['out'] if isinstance(out, dict) else out).flip(-1)
    torch.testing.assert_close(probs[:2], (plain[0][:2] + mirrored.as_subclass(torch.Tensor))/2)
    assert torch.equal(masks, plain[1]) and learn.tta(n=5)[0].shape == probs.shape
    assert (learn.tta(use_max=True)[0] >= plain[0] - 1e-6).all()
    with pytest.raises(TypeError, match='segmentation_learner'):
        Learner(learn.dls, learn.model, learn.loss_func).tta()


def test_pictures(learn):
    "show_results, and the images with the largest losses"
    learn.show_results(max_n=2)
    assert len(plt.gcf().axes) == 6
    top = Interpretation.from_learner(learn)
    top.plot_top_losses(2)
    assert 'loss = ' in plt.gcf().axes[2].get_title()
    losses, idx = top.top_losses()
    torch.testing.assert_close(losses, learn.get_preds(with_loss=True)[2][idx])
    top.show_results([0, 1])


def test_an_exported_learner_predicts_the_same(learn):
    "Without a clone of the weights: about as large as the weights"
    before = learn.predict(image)[2]
    learn.export('e.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        back = load_learner(learn.path/'e.pkl')
    assert torch.equal(back.predict(image)[2], before)
    weights = sum(v.numel()*v.element_size() for v in learn.model.state_dict().values())
    assert (learn.path/'e.pkl').stat().st_size < 1.2*weights + 200_000


def test_evaluate_needs_no_classes(learn):
    rows = evaluate(learn)
    assert rows['class'].tolist()[:-2] == list(learn.dls.vocab) and len(rows) == len(learn.dls.vocab) + 2


def test_tensorboard_with_its_defaults(learn, tmp_path):
    "A graph, scalars and pictures; and no hook is left behind"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    hooks = sum(len(m._forward_hooks) for m in learn.model.modules())
    with learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1, 1e-3, cbs=TensorBoardCallback(log_dir=tmp_path))
    assert sum(len(m._forward_hooks) for m in learn.model.modules()) == hooks
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    tags = EventAccumulator(str(tmp_path), size_guidance={'images': 0}).Reload().Tags()
    assert tags['images'] and tags['graph'] and 'train_loss' in tags['scalars']


def test_mixup_mixes_losses_and_cutmix_is_refused(learn):
    with learn.no_logging():
        learn.fit(1, 1e-3, cbs=MixUp())
        with pytest.raises(TypeError, match='MixUp'): learn.fit(1, cbs=CutMix())
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, CutMix)])


def test_images_of_other_channels(tmp_path):
    "Five channels, or grey: predicted, drawn, exported and explored as others are"
    for channels in (1, 5):
        pairs = [scene(np.random.default_rng(i), 32) for i in range(5)]
        items = [(np.dstack([x]*2)[..., :channels], y) for x, y in pairs]
        dls = mask_dataloaders(items[:3], items[3:], noop, scene_classes, scene_palette, 255, size=32, bs=2, seed=0)
        learn = segmentation_learner(dls, arch_args=dict(in_channels=channels), path=tmp_path)
        learn.remove_cb(learn.progress)
        with learn.no_logging(): learn.fit(1, 1e-3)
        found = learn.predict(items[0][0])
        assert found[2].shape == (7, 32, 32)
        if channels == 5:
            with pytest.raises(ValueError, match='image of 4 channels'): learn.predict(items[0][0][..., :4])
        assert (predict_mask(learn, items[0][0]) == found[1].numpy()).all() and len(evaluate(learn)) == 9
        learn.show_results()
        dls.test_dl([items[0][0]]).show_batch()
        Interpretation.from_learner(learn).plot_top_losses(2)
        learn.export('e.pkl')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert torch.equal(load_learner(tmp_path/'e.pkl').predict(items[0][0])[2], found[2])
        look = NoiseExplorer(learn.model, dls)
        shown = look.frame(dict(level=0.))['preds']['model']
        assert (np.asarray(shown)[0] == learn.predict(items[3][0])[1].numpy()).all()
        look.close()
    plt.close('all')


def test_noisy_weights_are_not_saved(tmp_path):
    "Each way to save says how; afterwards, and of a copy, they are what they should be"
    learn = segmentation_learner(scenes(n_train=2, n_valid=2, size=32, bs=2), path=tmp_path)
    clean = learn.model.heads[0].weight.detach().clone()
    with perturbed(learn.model, law):
        noisy = copy.deepcopy(learn.model)
        for save in (lambda: save_model(learn, tmp_path/'a'), lambda: save_model(learn.model, tmp_path/'a'),
                     lambda: learn.save('a'), lambda: learn.export('a')):
            with pytest.raises(RuntimeError, match=r'after the block, `.*copy.deepcopy\(model\)'): save()
        save_model(noisy, tmp_path/'noisy')
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ['noisy.json', 'noisy.safetensors']
    assert torch.equal(load_model(save_model(learn, tmp_path/'a')).heads[0].weight, clean)
    assert not torch.equal(load_model(tmp_path/'noisy').heads[0].weight, clean)


def lightning_recipe():
    "The callback as the tutorial has it"
    cells = json.loads((root/'nbs'/'tutorials'/'plain_pytorch.ipynb').read_text())['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    names = {}
    for s in [sources[0], next(s for s in sources if 'class NoisyTraining' in s)]: exec(s, names)
    return names['NoisyTraining']


def test_lightning(tmp_path):
    "The recipe: noise in forward and backward, clean steps; and backward outside of the block is answered"
    pl = pytest.importorskip('pytorch_lightning')
    seen = []

    class Module(pl.LightningModule):
        def __init__(self, block=None):
            super().__init__()
            self.net, self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), block
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
        def loss(self, x): return self.net(x).square().mean()
        def training_step(self, batch, i):
            seen.append(self.net[0].weight.detach().clone())
            if not self.block: return self.loss(batch[0])
            with perturbed(self.net, law): return self.loss(batch[0])

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(module.net[0].weight.detach().clone())

    def trainer(*cbs):
        return pl.Trainer(max_steps=2, accelerator='cpu', logger=False, enable_checkpointing=False, callbacks=[*cbs],
                          enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(4, 3, 8, 8)), batch_size=2)
    module = Module()
    start = module.net[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer(lightning_recipe()(law), Spy()).fit(module, batches)
        noisy, clean = seen[::2], seen[1::2]
        assert torch.equal(clean[0], start) and not torch.equal(noisy[0], start)
        assert not torch.equal(clean[1], start) and not torch.equal(noisy[1], clean[1])
    with pytest.warns(UserWarning, match='no gradient has arrived .*NoisyTraining'), pytest.raises(RuntimeError):
        trainer().fit(Module(block=True), batches)
