//! How many packets may be lost: bounds in time, counted at the rate of the run.

use crate::report::{Direction, Migration};

use super::checks::Checks;
use super::migration::millis;

/// At most so many packets are lost as are sent in so many milliseconds, where there is a bound.
pub(super) fn lost(checks: &mut Checks, way: &str, direction: &Direction, most_ms: Option<u32>) {
    if let Some(most_ms) = most_ms {
        let most = direction.packets_in(most_ms.into());
        let what = format!("packets lost {way}, in {most_ms} ms");
        checks.at_most(what, direction.lost, Some(most));
    }
}

/// What is lost towards the VM is lost for hardly longer than something takes. Gaps between arrivals would not do: a guest
/// that has little of its processor answers late what the network delivered in time.
pub(super) fn lost_beyond(
    checks: &mut Checks,
    migration: &Migration,
    what: &str,
    takes_ms: Option<f64>,
    most_ms: u32,
) {
    let lost = migration.to_vm.lost;
    let most = takes_ms.map(|takes_ms| migration.to_vm.packets_in(takes_ms + f64::from(most_ms)));
    checks.that(
        format!(
            "packets towards {} are lost for at most {what}",
            migration.vm
        ),
        most.is_some_and(|most| lost <= most),
        || match most.zip(takes_ms) {
            Some((most, takes_ms)) => {
                format!("{lost} are lost, which may be {most}: it takes {takes_ms:.1} ms")
            }
            None => "it is not known how long that takes".to_owned(),
        },
    );
}

/// From the pause to the open port.
pub(super) fn until_open_ms(migration: &Migration) -> Option<f64> {
    let opening = migration.early_opening.as_ref();
    let opening = opening.filter(|opening| opening.is_opened());
    opening.and_then(|opening| opening.open).map(millis)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::EarlyOpening;
    use crate::runner::checks::expectations;
    use crate::runner::checks::tests::{failed, migration};
    use crate::scenario::Expect;

    #[test]
    fn losses_are_held_against_the_pause() {
        let held = |lost, pause_ms, period_us| {
            let mut migration = migration(true, None);
            migration.pause_ms = pause_ms;
            let expect = Expect {
                max_lost_beyond_pause_ms: Some(50),
                ..Expect::default()
            };
            losing(migration, lost, period_us, &expect)
        };
        assert!(held(150, Some(100.0), 1_000));
        assert!(!held(151, Some(100.0), 1_000));
        assert!(held(75, Some(100.0), 2_000));
        assert!(!held(76, Some(100.0), 2_000));
        assert!(held(0, Some(100.0), 1_000));
        assert!(!held(0, None, 1_000));
    }

    /// Whether nothing is said of what a migration lost towards the VM.
    fn losing(mut migration: Migration, lost: u64, period_us: u64, expect: &Expect) -> bool {
        migration.to_vm.lost = lost;
        migration.to_vm.period_us = period_us;
        migration.tcp.survived = true;
        let mut checks = Checks::default();
        expectations(&mut checks, &migration, expect);
        !failed(checks).iter().any(|what| what.contains("lost"))
    }

    #[test]
    fn losses_are_held_against_the_time_that_the_port_took_to_open() {
        let held = |lost, open, period_us| {
            let migration = Migration {
                early_opening: Some(EarlyOpening {
                    result: "Opened".to_owned(),
                    open,
                    ..EarlyOpening::default()
                }),
                ..migration(true, None)
            };
            let expect = Expect {
                lost_until_open_ms: Some(3),
                ..Expect::default()
            };
            losing(migration, lost, period_us, &expect)
        };
        assert!(held(3, Some(850), 1_000));
        assert!(!held(4, Some(850), 1_000));
        assert!(held(4, Some(1_000), 1_000));
        // However slow the rate, the one packet that falls into that time is allowed.
        assert!(held(1, Some(850), 10_000));
        assert!(!held(2, Some(850), 10_000));
        assert!(!held(0, None, 1_000));
    }

    #[test]
    fn a_bound_of_losses_is_a_time() {
        let held = |lost, most_ms, period_us| {
            let expect = Expect {
                to_vm_max_lost_ms: Some(most_ms),
                ..Expect::default()
            };
            losing(migration(true, None), lost, period_us, &expect)
        };
        assert!(held(50, 50, 1_000) && !held(51, 50, 1_000));
        assert!(held(12, 50, 4_000) && !held(13, 50, 4_000));
        assert!(held(0, 0, 4_000) && !held(1, 0, 4_000));
    }
}
