//! Numbers with their units, and text that a terminal can be trusted with.

use std::time::Duration;

use crate::api::MAX_CANARY_WAIT_MS;

/// A duration of `ns` nanoseconds with three significant digits.
#[must_use]
pub(super) fn nanos(ns: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    nanos_f64(ns as f64)
}

/// As [`nanos`], for a mean.
#[must_use]
pub(super) fn nanos_f64(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns < 1e3 => (ns, "ns"),
        ns if ns < 1e6 => (ns / 1e3, "µs"),
        ns if ns < 1e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    let digits = match value {
        v if v >= 100.0 || v.fract() == 0.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {unit}")
}

/// Something per second, with three significant digits while it is small.
#[must_use]
pub(super) fn rate(per_s: f64) -> String {
    match per_s {
        v if v >= 999.5 =>
        {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "it is positive, and `as` saturates"
            )]
            count(v.round() as u64)
        }
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v if v >= 0.005 => format!("{v:.2}"),
        v if v > 0.0 => "<0.01".to_owned(),
        _ => "0".to_owned(),
    }
}

/// A number of bytes with its unit.
#[must_use]
pub(super) fn bytes(count: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let value = count as f64;
    match count {
        0..1_024 => format!("{count} B"),
        1_024..1_048_576 => format!("{:.1} KiB", value / 1_024.0),
        _ => format!("{:.1} MiB", value / 1_048_576.0),
    }
}

/// A count with separators between thousands.
#[must_use]
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Text from a worker, its control characters shown and not obeyed.
#[must_use]
pub(super) fn clean(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            cleaned.extend(c.escape_default());
        } else {
            cleaned.push(c);
        }
    }
    cleaned
}

/// As [`clean`], line by line.
#[must_use]
pub(super) fn clean_lines(text: &str) -> String {
    text.lines().map(|line| clean(line) + "\n").collect()
}

/// Bytes as hex, in pairs.
#[must_use]
pub(super) fn hex_pairs(hex: &str) -> String {
    let digits: Vec<char> = hex.chars().filter(|c| !c.is_whitespace()).collect();
    let pairs: Vec<String> = digits.chunks(2).map(|pair| pair.iter().collect()).collect();
    clean(&pairs.join(" "))
}

/// Parses `500ms`, `2s`, `1.5s` or a bare number of seconds, up to the API's
/// limit.
///
/// # Errors
/// A sentence that says what would be understood.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, scale) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 1e-3),
        (None, Some(number)) => (number, 1.0),
        (None, None) => (text, 1.0),
    };
    let understood = || "a time is a number with ms or s, such as 500ms or 2s".to_owned();
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if !plain {
        return Err(understood());
    }
    let seconds = number.parse::<f64>().map_err(|_| understood())? * scale;
    let limit = Duration::from_millis(MAX_CANARY_WAIT_MS);
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| *duration <= limit)
        .ok_or_else(|| format!("at most {} s", limit.as_secs()))
}

/// Parses the time between two looks: as [`parse_duration`], but not so short
/// that looking is all that is done.
///
/// # Errors
/// A sentence that says what would be understood.
pub(super) fn interval(text: &str) -> Result<Duration, String> {
    const SHORTEST: Duration = Duration::from_millis(100);
    parse_duration(text).and_then(|every| {
        if every < SHORTEST {
            return Err("at least 100ms".to_owned());
        }
        Ok(every)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_carry_their_unit() {
        let shown: Vec<String> = [0, 25, 999, 1_000, 21_350, 149_600, 1_500_000, 2_000_000_000]
            .map(nanos)
            .into();
        assert_eq!(
            shown,
            [
                "0 ns", "25 ns", "999 ns", "1 µs", "21.4 µs", "150 µs", "1.50 ms", "2 s"
            ]
        );
        assert_eq!(nanos_f64(24.6), "24.6 ns");
    }

    #[test]
    fn sizes_and_counts_read_easily() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(67_584), "66.0 KiB");
        assert_eq!(bytes(3 << 20), "3.0 MiB");
        assert_eq!(
            [0, 999, 1_000, 1_234_567].map(count),
            ["0", "999", "1,000", "1,234,567"]
        );
    }

    #[test]
    fn a_worker_can_not_drive_the_terminal() {
        assert_eq!(clean("lib\u{1b}[2Jfoo\n.so"), "lib\\u{1b}[2Jfoo\\n.so");
        assert_eq!(clean("Größe"), "Größe");
        assert_eq!(clean_lines("a\nb\u{7}"), "a\nb\\u{7}\n");
    }

    #[test]
    fn times_are_parsed_strictly() {
        let ms = |text| parse_duration(text).map(|duration| duration.as_millis());
        assert_eq!(ms("500ms"), Ok(500));
        assert_eq!(ms("2s"), Ok(2_000));
        assert_eq!(ms("1.5s"), Ok(1_500));
        assert_eq!(ms("0"), Ok(0));
        assert_eq!(ms("61s"), Err("at most 60 s".to_owned()));
        for text in ["", "s", "-1s", "1m", "1 s", "inf", "1e3s", "1.2.3"] {
            assert!(ms(text).unwrap_err().starts_with("a time is"), "{text}");
        }
    }

    #[test]
    fn rates_are_as_exact_as_they_are_worth() {
        let shown = [0.0, 0.001, 0.1, 3.0, 12.34, 99.96, 999.4, 1_234.5, 2e6].map(rate);
        assert_eq!(
            shown,
            [
                "0",
                "<0.01",
                "0.10",
                "3.00",
                "12.3",
                "100",
                "999",
                "1,235",
                "2,000,000"
            ]
        );
    }

    #[test]
    fn looking_all_the_time_is_refused() {
        assert_eq!(interval("0.1"), Ok(Duration::from_millis(100)));
        assert_eq!(interval("99ms"), Err("at least 100ms".to_owned()));
        assert_eq!(interval("61"), Err("at most 60 s".to_owned()));
        assert!(interval("soon").unwrap_err().starts_with("a time is"));
    }

    #[test]
    fn hex_is_grouped_by_bytes() {
        assert_eq!(hex_pairs("4989e0ff5508"), "49 89 e0 ff 55 08");
    }
}
