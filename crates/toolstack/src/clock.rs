//! Points of time as text, in UTC.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// A second in UTC. Its text form is `2026-11-21T02:19:00Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Utc {
    unix_s: u64,
}

impl Utc {
    pub(crate) fn now() -> Utc {
        let unix_s = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        Utc { unix_s }
    }

    /// So many seconds after the beginning of 1970.
    pub(crate) fn at(unix_s: u64) -> Utc {
        Utc { unix_s }
    }

    pub(crate) fn unix_s(self) -> u64 {
        self.unix_s
    }

    /// Year, month from 1, day from 1, in the Gregorian calendar.
    fn date(self) -> (u64, u64, u64) {
        // Years begin in March here, so that the leap day is the last of its year.
        let days = self.unix_s / 86_400 + 719_468;
        let era = days / 146_097;
        let day_of_era = days % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        (year, month, day)
    }

    fn hour_minute(self) -> (u64, u64) {
        (self.unix_s / 3600 % 24, self.unix_s / 60 % 60)
    }

    /// What xl appends to the name of a domain kept by rename-restart, such as `-20261121T0219Z`.
    pub(crate) fn name_suffix(self) -> String {
        let (year, month, day) = self.date();
        let (hour, minute) = self.hour_minute();
        format!("-{year:04}{month:02}{day:02}T{hour:02}{minute:02}Z")
    }
}

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.date();
        let (hour, minute) = self.hour_minute();
        let second = self.unix_s % 60;
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_known_seconds_gives_their_dates() {
        let cases = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_799, "2000-02-29T23:59:59Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ];
        for (unix_s, text) in cases {
            assert_eq!(Utc { unix_s }.to_string(), text);
        }
        assert_eq!(Utc { unix_s: 0 }.name_suffix(), "-19700101T0000Z");
    }
}
