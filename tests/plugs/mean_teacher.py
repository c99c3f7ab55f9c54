"A method: a mean teacher, that is an average of the student's past, labels the images that have no mask."
import copy

import torch
import torch.nn.functional as F

from noisyseg.basics import unwrapped
from noisyseg.nets.adapter import logits_of
from noisyseg.train.method import Method


class MeanTeacher(Method):
    "Learn from few masks, and from what an average of the student's past says of the other images."
    depth = 50
    objective = True

    def __init__(self, decay=0.9, threshold=0.3):
        self.decay = decay
        self.threshold = threshold
        self.teacher = None
        self.n_steps = 0

    def describe(self): return f'mean teacher, decay {self.decay}'

    def before_fit(self):
        if self.teacher is None: self.teacher = copy.deepcopy(unwrapped(self.learn.model)).requires_grad_(False)

    def gradients(self, step, batch, draw, inner):
        x, y, weak, strong, *_ = (*batch.xb, *batch.yb)
        learn = step.learn
        with torch.no_grad(): sure, labels = logits_of(self.teacher, weak).softmax(1).max(1)
        taught = F.cross_entropy(logits_of(learn.model, strong), labels, reduction='none')
        learn.xb, learn.yb = (x,), (y,)
        loss = lambda pred: learn.loss_func(pred, y) + (taught * (sure >= self.threshold)).mean()
        step.deliver(learn.model(x), loss)

    def after_step(self):
        self.n_steps = self.n_steps + 1
        student = unwrapped(self.learn.model).state_dict()
        with torch.no_grad():
            for k, v in self.teacher.state_dict().items():
                if v.is_floating_point(): v.lerp_(student[k], 1 - self.decay)
                else: v.copy_(student[k])

    def state_dict(self):
        teacher = self.teacher.state_dict() if self.teacher is not None else {}
        return {'n_steps': self.n_steps, **{f'teacher.{k}': v.clone() for k, v in teacher.items()}}

    def load_state_dict(self, state):
        self.n_steps = state['n_steps']
        if self.teacher is None: self.before_fit()
        weights = {k.removeprefix('teacher.'): v for k, v in state.items() if k.startswith('teacher.')}
        self.teacher.load_state_dict(weights)
