//! A line of `virsh event --event lifecycle --timestamp`, in the C locale (tools/virsh-domain-event.c in libvirt):
//! `2026-09-01 10:00:05.123+0000: event 'lifecycle' for domain 'default_web': Suspended Migrated`.

use crate::signals::lifecycle::Change;
use crate::time::Nanos;

/// Printed when the connection has ended, ahead of a number.
const PARTING: &str = "events received: ";

/// Not such a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// What such a line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event<'a> {
    pub(super) at: Nanos,
    pub(super) domain: &'a str,
    pub(super) change: Change,
}

/// None if it says something that no migration needs.
pub(super) fn parse(line: &[u8]) -> Result<Option<Event<'_>>, Malformed> {
    let line = str::from_utf8(line).map_err(|_| Malformed)?;
    if line.starts_with(PARTING) {
        return Ok(None);
    }
    let (stamp, rest) = line
        .split_once(": event 'lifecycle' for domain '")
        .ok_or(Malformed)?;
    // From the end: a name may have anything in it but a slash and a line's end, an event's words have no quotes.
    let (domain, words) = rest.rsplit_once("': ").ok_or(Malformed)?;
    let (event, detail) = words.split_once(' ').ok_or(Malformed)?;
    if domain.is_empty() {
        return Err(Malformed);
    }
    let at = time(stamp).ok_or(Malformed)?;
    Ok(change(event, detail).map(|change| Event { at, domain, change }))
}

/// libvirt's words: `virDomainEventType` and the type of its detail (libvirt-domain.h).
fn change(event: &str, detail: &str) -> Option<Change> {
    // With post-copy the guest goes on there before everything is copied; for the network it has moved all the same.
    let migration = matches!(detail, "Migrated" | "Post-copy");
    match event {
        "Started" if migration => Some(Change::Incoming),
        "Suspended" => Some(Change::Suspended {
            migrating: migration,
        }),
        "Resumed" => Some(Change::Resumed {
            migrated: migration,
        }),
        "Stopped" | "Crashed" => Some(Change::Stopped {
            migrated: migration,
        }),
        _ => None,
    }
}

/// `2026-09-01 10:00:05.123+0000`; virsh writes UTC.
fn time(text: &str) -> Option<Nanos> {
    let (date, time) = text.split_once(' ')?;
    let mut date = date.splitn(3, '-').map(number);
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (clock, east) = zone(time)?;
    let (clock, millis) = clock.split_once('.')?;
    let mut clock = clock.splitn(3, ':').map(number);
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    if millis.len() != 3 || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let days = days(year, month, day)?;
    let local = ((days * 24 + hour) * 60 + minute) * 60 + second;
    let seconds = local.checked_add_signed(-east)?;
    let nanoseconds = u32::try_from(number(millis)?).ok()? * 1_000_000;
    Nanos::from_parts(seconds, nanoseconds)
}

/// A time without its zone, and how many seconds the zone is ahead of UTC.
fn zone(time: &str) -> Option<(&str, i64)> {
    let at = time.rfind(['+', '-'])?;
    let (clock, zone) = time.split_at_checked(at)?;
    let (sign, digits) = zone.split_at_checked(1)?;
    let (hours, minutes) = digits.split_at_checked(2)?;
    if minutes.len() != 2 {
        return None;
    }
    let ahead = i64::try_from((number(hours)? * 60 + number(minutes)?) * 60).ok()?;
    Some((clock, if sign == "-" { -ahead } else { ahead }))
}

/// Days since 1970 began, of a day in the Gregorian calendar.
fn days(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years that begin in March have their leap day at the end, and their months before it 153 days for every five.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let before_year = year * 365 + year / 4 - year / 100 + year / 400;
    let before_month = (153 * month + 2) / 5;
    // 719,468 days lie between March 1st of the year 0 and 1970.
    Some(before_year + before_month + day - 1 - 719_468)
}

/// Digits and nothing else: `parse` would take a sign.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    const PAUSED: Change = Change::Suspended { migrating: true };

    fn line(name: &str, words: &str) -> String {
        format!("2026-09-01 10:00:05.123+0000: event 'lifecycle' for domain '{name}': {words}")
    }

    #[rstest]
    #[case("Suspended Migrated", Some(PAUSED))]
    #[case("Suspended Post-copy", Some(PAUSED))]
    #[case("Suspended Post-copy Error", Some(Change::Suspended { migrating: false }))]
    #[case("Suspended Paused", Some(Change::Suspended { migrating: false }))]
    #[case("Suspended I/O Error", Some(Change::Suspended { migrating: false }))]
    #[case("Resumed Migrated", Some(Change::Resumed { migrated: true }))]
    #[case("Resumed Post-copy", Some(Change::Resumed { migrated: true }))]
    #[case("Resumed Unpaused", Some(Change::Resumed { migrated: false }))]
    #[case("Stopped Migrated", Some(Change::Stopped { migrated: true }))]
    #[case("Stopped Destroyed", Some(Change::Stopped { migrated: false }))]
    #[case("Crashed Panicked", Some(Change::Stopped { migrated: false }))]
    #[case("Started Migrated", Some(Change::Incoming))]
    #[case("Started Booted", None)]
    #[case("Shutdown Finished after guest request", None)]
    #[case("Defined Added", None)]
    #[case("unknown unknown", None)]
    fn means(#[case] words: &str, #[case] expected: Option<Change>) {
        let line = line("default_web", words);
        let event = parse(line.as_bytes()).unwrap();
        assert_eq!(event.as_ref().map(|event| event.change), expected);
        if let Some(event) = event {
            assert_eq!(event.domain, "default_web");
            assert_eq!(event.at, Nanos(1_788_256_805_123_000_000));
        }
    }

    /// As virsh 9.0 printed it.
    #[test]
    fn a_name_that_looks_like_the_rest_of_a_line() {
        let line = b"2026-11-27 18:21:25.591+0000: event 'lifecycle' for domain 'x': Suspended Migrated': Suspended Paused";
        let event = parse(line).unwrap().unwrap();
        assert_eq!(event.domain, "x': Suspended Migrated");
        assert_eq!(event.change, Change::Suspended { migrating: false });
    }

    #[test]
    fn its_last_line_is_none_of_interest() {
        assert_eq!(parse(b"events received: 7"), Ok(None));
    }

    #[rstest]
    #[case("host-7")]
    #[case("")]
    #[case("2026-09-01 10:00:05.123+0000: event 'lifecycle' for domain 'web")]
    #[case("2026-09-01 10:00:05.123+0000: event 'lifecycle' for domain '': Suspended Migrated")]
    #[case("2026-09-01 10:00:05.123+0000: event 'lifecycle' for domain 'web': Suspended")]
    #[case("event 'lifecycle' for domain 'web': Suspended Migrated")]
    #[case(": event 'lifecycle' for domain 'web': Suspended Migrated")]
    #[case("2026-13-01 10:00:05.123+0000: event 'lifecycle' for domain 'web': Suspended Migrated")]
    #[case("1969-12-31 10:00:05.123+0000: event 'lifecycle' for domain 'web': Suspended Migrated")]
    #[case("2026-09-01 +1:00:05.123+0000: event 'lifecycle' for domain 'web': Suspended Migrated")]
    #[case("2026-09-01 10:00:05.123+000: event 'lifecycle' for domain 'web': Suspended Migrated")]
    #[case("9999-09-01 10:00:05.123+0000: event 'lifecycle' for domain 'web': Suspended Migrated")]
    fn malformed(#[case] line: &str) {
        assert_eq!(parse(line.as_bytes()), Err(Malformed));
    }

    #[rstest]
    #[case("1970-01-01 00:00:00.000+0000", 0)]
    #[case("2000-02-29 23:59:59.999+0000", 951_868_799_999)]
    #[case("2026-09-01 12:30:05.123+0230", 1_788_256_805_123)]
    #[case("2026-09-01 06:00:05.123-0400", 1_788_256_805_123)]
    fn times(#[case] text: &str, #[case] millis: u64) {
        assert_eq!(time(text), Some(Nanos(millis * 1_000_000)));
    }

    fn is_leap(year: u64) -> bool {
        year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400)
    }

    /// Counted one by one.
    fn days_by_counting(year: u64, month: usize, day: u64) -> u64 {
        let years: u64 = (1970..year)
            .map(|year| if is_leap(year) { 366 } else { 365 })
            .sum();
        let february = if is_leap(year) { 29 } else { 28 };
        let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        years + months[..month - 1].iter().sum::<u64>() + day - 1
    }

    proptest! {
        #[test]
        fn every_day_is_counted(year in 1970_u64..2554, month in 1_usize..=12, day in 1_u64..=28) {
            prop_assert_eq!(
                days(year, month as u64, day),
                Some(days_by_counting(year, month, day))
            );
        }

        #[test]
        fn every_name_is_read(name in "[^/\n]{1,40}") {
            let line = line(&name, "Suspended Migrated");
            prop_assert_eq!(parse(line.as_bytes()).unwrap().unwrap().domain, name);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), at in 0_usize..90, byte in any::<u8>()) {
            let _ = parse(&bytes);
            let mut line = line("default_web", "Suspended Migrated").into_bytes();
            if let Some(place) = line.get_mut(at) {
                *place = byte;
            }
            let _ = parse(&line);
            let _ = parse(&line[..at]);
        }
    }
}
