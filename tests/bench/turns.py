"""Measuring configurations in turns, so that a drift of the machine meets all of them."""
import statistics
from collections import namedtuple

from processes import Failed

Taken = namedtuple("Taken", "round place name rate")


class Turns:
    """Configurations that are measured in turns, by their names. One that fails is told once and measured no more."""

    def __init__(self, report, rounds, steps_at, title):
        """steps_at: how many steps a measurement takes at a rate."""
        self.report, self.rounds, self.steps_at, self.title = report, range(rounds), steps_at, title
        self.measures, self.steps, self.memory, self.taken, self.failed = {}, {}, {}, [], set()

    def add(self, name, measure):
        """measure: from a number of steps to samples_per_second and peak_bytes."""
        self.measures[name], self.steps[name], self.memory[name] = measure, self.steps_at(0), 0

    def fail(self, name, why):
        self.failed.add(name)
        self.report.fail(f"{self.title} {name}", why)

    def take(self, names, round_number=None):
        """Each of the names, which may be there several times. Without a round only the number of steps that a
        measurement needs is found out."""
        for place, name in enumerate(names):
            if name in self.failed:
                continue
            try:
                figures = self.measures[name](self.steps[name])
            except Failed as failure:
                self.fail(name, failure)
                continue
            self.steps[name] = self.steps_at(figures["samples_per_second"])
            self.memory[name] = max(self.memory[name], figures["peak_bytes"])
            self.taken.append(Taken(round_number, place, name, figures["samples_per_second"]))

    def rates(self, name, rounds):
        return [taken.rate for taken in self.taken if taken.name == name and taken.round in rounds]

    def rate(self, name):
        """Median over all rounds; None where it failed."""
        rates = self.rates(name, self.rounds)
        return statistics.median(rates) if rates and name not in self.failed else None

    def ratio(self, name, other):
        """Median of the rates of one to those of the other within the rounds: of runs one directly after the other
        where there are any, else of the medians of a round. None where one failed."""
        if self.rate(name) is None or self.rate(other) is None:
            return None
        counted = [taken for taken in self.taken if taken.round is not None]
        ratios = []
        for one, after in zip(counted, counted[1:]):
            rates = {one.name: one.rate, after.name: after.rate}
            if rates.keys() == {name, other} and (after.round, after.place) == (one.round, one.place + 1):
                ratios.append(rates[name] / rates[other])
        if not ratios:
            ratios = [statistics.median(self.rates(name, [i])) / statistics.median(self.rates(other, [i]))
                      for i in self.rounds]
        return statistics.median(ratios)
