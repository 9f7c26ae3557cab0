"""Environments of other libraries in the form that `rollout.environment` takes. A file of one's own
makes the world and names what connects it with text:

    # lake.py; in the recipe: `rollout: {environment: lake.py:World}`
    import gymnasium
    from alignkit.rollout.adapters import GymnasiumWorld

    def World():
        lake = gymnasium.make("FrozenLake-v1", render_mode="ansi")
        return GymnasiumWorld(lake, act=int, see=lambda _: lake.render())

Nothing of those libraries is imported here. An `act` that raises ValueError says that a turn is no
action: the policy reads why, and the episode goes on.
"""

from collections.abc import Callable
from typing import Any

Step = tuple[str, float, bool]  # what the world says, the reward, whether the episode has ended


class _TextWorld:
    """What worlds have in common whose actions and observations are made of, and into, text.

    act  makes an action of a turn's text
    see  makes a text of an observation
    """

    def __init__(self, *, act: Callable[[str], Any], see: Callable[[Any], str] = str) -> None:
        self.act = act
        self.see = see

    def seed(self, number: int) -> None:
        """Of what the world draws in the next episode, where it draws anything."""
        self.number = number % (1 << 31)

    def step(self, text: str) -> Step:
        """The observation after an action, its reward, and whether it ended the episode."""
        try:
            action = self.act(text)
        except ValueError as error:
            return str(error), 0.0, False
        observation, reward, ended = self._acted(action)
        self.seen = self.see(observation)
        return self.seen, reward, ended

    def state(self) -> str:
        """The observation in which the next turn is taken."""
        return self.seen

    def _acted(self, action: Any) -> tuple[Any, float, bool]:
        """The observation, the reward and whether the episode has ended."""
        raise NotImplementedError


class GymnasiumWorld(_TextWorld):
    """An environment of Gymnasium (`gymnasium.Env`) whose actions and observations have a text.

    act  makes an action of a turn's text
    see  makes a text of an observation
    """

    def __init__(
        self, world: Any, *, act: Callable[[str], Any] = str, see: Callable[[Any], str] = str
    ) -> None:
        super().__init__(act=act, see=see)
        self.world = world

    def reset(self, **row: Any) -> str:
        """A new episode; the first observation. The row goes along as Gymnasium's `options`."""
        observation, _ = self.world.reset(seed=self.number, options=row)
        self.seen = self.see(observation)
        return self.seen

    def _acted(self, action: Any) -> tuple[Any, float, bool]:
        observation, reward, terminated, truncated, _ = self.world.step(action)
        return observation, float(reward), bool(terminated or truncated)


class OpenEnvWorld(_TextWorld):
    """An OpenEnv server, over the client that speaks with it: anything with `reset(seed=...)`
    and `step(action)` whose results have `observation`, `reward` and `done`.

        def World():
            client = GenericEnvClient(base_url="http://127.0.0.1:8000").sync()
            return OpenEnvWorld(client, act=lambda text: {"message": text},
                                see=lambda observation: observation["echoed_message"])

    The server needs as many sessions as episodes are played at a time.
    """

    def __init__(
        self, client: Any, *, act: Callable[[str], Any], see: Callable[[Any], str] = str
    ) -> None:
        super().__init__(act=act, see=see)
        self.client = client

    def reset(self, **row: Any) -> str:
        """A new episode; the first observation."""
        self.seen = self.see(self.client.reset(seed=self.number).observation)
        return self.seen

    def _acted(self, action: Any) -> tuple[Any, float, bool]:
        result = self.client.step(action)
        return result.observation, float(result.reward or 0.0), bool(result.done)
