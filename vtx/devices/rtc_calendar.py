"""Calendar arithmetic for the real-time clock, on whatever a guest wrote into its registers.

No value raises: what is out of range counts on from where it says, as "32 January" is 1 February.
"""

from __future__ import annotations

from attrs import define

DAY = 86_400
YEARS_OF_CYCLE = 400
DAYS_OF_CYCLE = 146_097
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


@define(slots=True)
class CalendarTime:
    """A date and time; ``weekday`` is 1 for Sunday, or whatever was written."""

    second: int
    minute: int
    hour: int
    weekday: int
    day: int
    month: int
    year: int

    @property
    def second_of_day(self) -> int:
        """Seconds since midnight."""
        return (self.hour * 60 + self.minute) * 60 + self.second

    def add(self, seconds: int) -> None:
        """Move forward."""
        days, rest = divmod(self.second_of_day + seconds, DAY)
        self.hour, rest = divmod(rest, 3600)
        self.minute, self.second = divmod(rest, 60)
        if days:
            self._add_days(days)

    def _add_days(self, days: int) -> None:
        self.weekday = (self.weekday - 1 + days) % 7 + 1
        cycles, days = divmod(max(self.day, 1) - 1 + days, DAYS_OF_CYCLE)
        year = self.year + cycles * YEARS_OF_CYCLE
        month = (self.month - 1) % 12 + 1
        while days >= (length := days_in_month(year, month)):
            days -= length
            year, month = (year, month + 1) if month < 12 else (year + 1, 1)
        self.day, self.month, self.year = days + 1, month, year


def days_in_month(year: int, month: int) -> int:
    """Days of ``month``, 1 to 12, in the Gregorian calendar."""
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return 29 if month == 2 and leap else MONTH_DAYS[month - 1]
