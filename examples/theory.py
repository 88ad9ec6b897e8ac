# %% [markdown]
# # The theory, computed
#
# Two worlds in which everything about Q-score matching is known exactly: a gridworld, and linear-quadratic control in
# continuous time. Run it cell by cell in an editor that knows `# %%`, make a notebook of it with
# `jupytext --to ipynb theory.py`, or run it as it is; it takes less than a minute:
#
#     pip install 'qsm-lightning[theory]'
#     python theory.py [FOLDER]
#
# The pictures go to FOLDER, which is `theory` by default.

# %%
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from qsm_lightning.theory.gridworld import MAP, entropy, policy_iteration, read_map
from qsm_lightning.theory.gridworld_picture import draw_gridworld
from qsm_lightning.theory.learning import learn
from qsm_lightning.theory.lq import scalar
from qsm_lightning.theory.lq_picture import draw_time_steps
from qsm_lightning.theory.lq_steps import discrete_policy_iteration
from qsm_lightning.theory.time_steps import measure

notebook = "ipykernel" in sys.modules  # where argv is the kernel's
folder = Path(sys.argv[1] if len(sys.argv) > 1 and not notebook else "theory")
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A gridworld: score and Q-gradient become parallel
#
# A round of Q-score matching in a table is pi <- softmax(alpha Q). The score of the policy is then alpha times the
# gradient of Q, up to what Q has changed by. It begins with a random policy, whose score has nothing to do with Q. At
# the fixed point the cosine between score and Q-gradient is 1.

# %%
world = read_map(MAP)
found = {alpha: policy_iteration(world, alpha) for alpha in (1.0, 10.0)}
for alpha, rounds in found.items():
    for number in (0, 1, 2, len(rounds) - 1):
        policy = rounds[number]
        spread = entropy(policy.log_policy)[world.away].mean()
        print(f"gridworld, alpha {alpha:g}, round {number}: cosine {policy.cosine:.4f}, entropy {spread:.3f}")
draw_gridworld(world, found).savefig(folder / "gridworld.png")

# %% [markdown]
# alpha is how much is made of Q: the greater it is, the less entropy is left. It is log 4 = 1.386 for a uniform policy.
# It does not fall to 0, as from many cells two ways are equally short, and both are kept.

# %%
alphas = [0.3, 1.0, 3.0, 10.0, 30.0]
last = [policy_iteration(world, alpha)[-1] for alpha in alphas]
entropies = [float(entropy(policy.log_policy)[world.away].mean()) for policy in last]
for alpha, value in zip(alphas, entropies, strict=True):
    print(f"gridworld, alpha {alpha:g}: entropy {value:.3f} at the fixed point")

figure = Figure(figsize=(5, 3.5), layout="constrained")
axis = figure.subplots()
axis.semilogx(alphas, entropies, "o-")
axis.axhline(np.log(4), color="0.6", ls=":", label="uniform policy")
axis.set(xlabel=r"$\alpha$", ylabel="entropy at the fixed point", ylim=(0, None), title="Gridworld: entropy per alpha")
axis.legend(frameon=False)
figure.savefig(folder / "entropy.png")

# %% [markdown]
# ## Linear-quadratic control: a closed form in continuous time
#
# State and action move together, z = (x, a), and the score Psi is the action's velocity. With a quadratic reward the
# best Q is the quadratic -1/2 z'Pz + c, and the best score is linear, -K z. P solves a Riccati equation. That it also
# solves the Hamilton-Jacobi-Bellman equation can be seen at any z: the residual is 0, but not for another P.

# %%
problem = scalar()
best = problem.optimal()
z = np.random.default_rng(0).normal(size=(1000, 2))
print(f"lq: P = {best.P.round(4).tolist()}, c = {best.c:.4f}, K = {best.K.round(4).tolist()}")
print(f"lq: largest HJB residual {np.abs(problem.hjb_residual(z, best.P, best.c)).max():.1e}")
print(f"lq: with P 1 % too large {np.abs(problem.hjb_residual(z, 1.01 * best.P, best.c)).max():.1e}")

# %% [markdown]
# ### Exact score matching improves in every round
#
# A round evaluates the score -K z, which a linear equation does, and matches the score to the gradient of its Q:
# K <- G'P / lambda. From no score at all, P falls in every round: z'Pz is less, and Q more, at every z.

# %%
rounds = problem.policy_iteration(np.zeros_like(best.K), 6)
traces = [float(np.trace(solution.P)) for solution in rounds]
for number in range(1, len(rounds)):
    gain = np.linalg.eigvalsh(rounds[number - 1].P - rounds[number].P).min()
    print(f"lq, round {number}: trace of P {traces[number]:.6f}, nowhere worse: {bool(gain > -1e-9)}")
print(f"lq: the best trace is {np.trace(best.P):.6f}")

# %% [markdown]
# ### A score that is not aligned is worse
#
# Scale the best score, so that lambda Psi is not grad_a Q any more. The value falls, here its mean over where the best
# score leaves z in the long run.

# %%
S = problem.stationary(best.K)
factors = np.linspace(0.5, 2, 16)
solutions = [problem.evaluate(factor * best.K) for factor in factors]
means = [float(solution.c - np.trace(solution.P @ S) / 2) for solution in solutions]
for factor, mean in list(zip(factors, means, strict=True))[::5]:
    print(f"lq, {factor:g} times the best score: mean value {mean:.4f}")

figure = Figure(figsize=(9, 3.5), layout="constrained")
left, right = figure.subplots(1, 2)
left.semilogy([max(trace - np.trace(best.P), 1e-16) for trace in traces], "o-")
left.set(xlabel="round", ylabel="tr P - tr of the best P", title="Exact score matching")
right.plot(factors, means)
right.axvline(1, color="0.6", ls=":", label=r"aligned: $\lambda\Psi = \nabla_a Q$")
right.set(xlabel="score, in units of the best", ylabel="mean value", title="A misaligned score is worse")
right.legend(frameon=False)
figure.savefig(folder / "improvement.png")

# %% [markdown]
# ### Learned from frames alone
#
# The loss of `model.loss: cqsm` learns the same from simulated steps of 1/40, without being told the dynamics. What
# there is left of an error is mostly that of the time step: against the fixed point of these steps it is smaller.

# %%
learned = learn(problem, 1 / 40, updates=2000)
stepped = discrete_policy_iteration(problem, 1 / 40, np.exp(-problem.beta / 40))
for name, exact in {"continuous time": best, "steps of 1/40": stepped}.items():
    errors = learned.errors(problem, exact)
    print(f"learned against {name}: error of P {errors.P:.4f}, of Q {errors.q:.4f}, of the score {errors.score:.4f}")
print(f"learned: P = {learned.loss.critics.P.detach().numpy().round(4).tolist()}")

# %% [markdown]
# ## The time step
#
# CQSM discounts by exp(-beta dt), so that its Q stays where it is when steps get shorter, and the error falls in
# proportion to dt. A discrete method's gamma is one number. Set for steps of 1/20, its Q falls with the time step, as
# it still looks ahead for the same number of steps: halve them, and it looks half as far.

# %%
set_at = Fraction(1, 20)
points = measure(problem, [Fraction(1, 5 * 2**k) for k in range(7)], set_at)
for point in points:
    if point.exact:
        print(f"dt {point.dt}, {point.method}: mean Q {point.exact.q_mean:.3f} of the exact, error {point.exact.q:.4f}")
draw_time_steps(points, set_at).savefig(folder / "time_steps.png")
print(f"pictures: {', '.join(sorted(str(path) for path in folder.glob('*.png')))}")
