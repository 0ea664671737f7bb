//! A controller that is killed in a migration, between two of its writes.

use std::sync::Arc;

use anyhow::Result;
use tokio::sync::Mutex;

use crate::cluster::{Controller, Gate};
use crate::report::Check;
use crate::scenario::{Kill, Migrate, Moment};

use super::Bench;
use super::checks::Checks;
use super::feeders::{self, Followed};
use super::moments::Moments;
use super::ovn::Ovn;

/// What the controller writes to OVN in a migration.
const WRITES: [Moment; 5] = [
    Moment::Armed,
    Moment::BarrierRaised,
    Moment::Flipped,
    Moment::Settled,
    Moment::Released,
];

/// A controller that is to be killed.
pub(super) struct Killing {
    kill: Kill,
    /// Its VM keeps its egress for a while.
    keeps_egress: bool,
    /// A CNI wipes the marks, whenever it writes the port's columns over.
    wiped: bool,
    gate: Gate,
    controller: Arc<Mutex<Controller>>,
    ovn: Ovn,
}

impl Killing {
    /// Where it is to be killed, starts the controller anew, so that it can be hit between two writes.
    pub(super) async fn prepare(bench: &Bench<'_>, migrate: &Migrate) -> Result<Option<Self>> {
        let Some(kill) = migrate.kill_controller else {
            return Ok(None);
        };
        let gate = Gate::open(&bench.lab.nb_endpoint()).await?;
        let controller = Arc::clone(&bench.controller);
        controller.lock().await.restart(Some(&gate)).await?;
        gate.slow();
        Ok(Some(Self {
            kill,
            keeps_egress: migrate.expect.min_flip_ms.is_some(),
            wiped: bench.scenario.cni.is_some(),
            gate,
            controller,
            ovn: bench.ovn.clone(),
        }))
    }

    /// Kills it at its moment and starts it at another. Returns whether it was hit where it should be.
    pub(super) async fn run(self, followed: Followed, moments: Moments) -> Result<Vec<Check>> {
        let Kill { at, restart_at } = self.kill;
        moments.wait(at).await;
        self.gate.shut();
        let mut controller = self.controller.lock().await;
        controller.crash().await?;
        // Whoever writes is dead, so what is there is all that it has written.
        feeders::look(&self.ovn.now().await?, &followed, &moments);
        let checks = in_place(at, self.keeps_egress, self.wiped, &moments);
        if let Some(restart_at) = restart_at {
            moments.wait(restart_at).await;
        }
        controller.start().await?;
        Ok(checks.0)
    }
}

/// Nothing that comes after has been written.
fn in_place(at: Moment, keeps_egress: bool, wiped: bool, moments: &Moments) -> Checks {
    let mut checks = Checks::default();
    let rank = |moment| match moment {
        // Egress is kept beyond the end of the migration.
        Moment::Flipped if keeps_egress => (Moment::Settled, true),
        moment => (moment, false),
    };
    let mut later: Vec<_> = WRITES.into_iter().filter(|w| rank(*w) > rank(at)).collect();
    later.retain(|write| !(wiped && *write == Moment::Released));
    later.sort_by_key(|write| rank(*write));
    if let Some(next) = later.first() {
        checks.that(
            format!("the controller that is killed at {at:?} dies before {next:?}"),
            later.iter().all(|write| moments.at(*write).is_none()),
            || format!("by then: {}", moments.so_far()),
        );
    }
    checks
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    /// Whether a kill hit its place, by what had happened; `None` where there is no place to miss.
    fn hit(at: Moment, keeps_egress: bool, noted: &[Moment]) -> Option<bool> {
        let checks = in_place(at, keeps_egress, false, &noting(noted)).0;
        checks.first().map(Check::held)
    }

    fn noting(noted: &[Moment]) -> Moments {
        let moments = Moments::new();
        for moment in noted {
            moments.note(*moment, SystemTime::UNIX_EPOCH);
        }
        moments
    }

    #[test]
    fn marks_that_a_cni_wiped_say_nothing_of_the_controllers_writes() {
        let seen = noting(&[Moment::Armed, Moment::Released, Moment::Paused]);
        let checks = |wiped| in_place(Moment::Paused, false, wiped, &seen).0;
        assert!(!checks(false).first().is_some_and(Check::held));
        assert!(checks(true).first().is_some_and(Check::held));
        let settled = noting(&[Moment::Settled, Moment::Paused]);
        let late = in_place(Moment::Paused, false, true, &settled).0;
        assert!(!late.first().is_some_and(Check::held));
    }

    #[test]
    fn a_kill_hits_where_nothing_later_is_written() {
        use Moment::{Armed, BarrierRaised, Claimed, Created, Ended, Flipped, Kept};
        use Moment::{Ready, Released, Resumed, Scheduled, Settled};

        assert_eq!(hit(Scheduled, false, &[Created, Scheduled]), Some(true));
        assert_eq!(hit(Scheduled, false, &[Scheduled, Armed]), Some(false));
        assert_eq!(hit(Claimed, false, &[Armed, Claimed]), Some(true));
        let barrier = [Armed, Claimed, BarrierRaised];
        assert_eq!(hit(Claimed, false, &barrier), Some(false));
        assert_eq!(hit(BarrierRaised, false, &barrier), Some(true));
        // What others do may have happened by then.
        assert_eq!(hit(BarrierRaised, false, &[Ready, Resumed]), Some(true));
        assert_eq!(hit(BarrierRaised, false, &[Settled]), Some(false));
        assert_eq!(hit(Flipped, false, &[Flipped]), Some(true));
        assert_eq!(hit(Settled, false, &[Flipped, Settled]), Some(true));
        let all = [Flipped, Settled, Released];
        assert_eq!(hit(Settled, false, &all), Some(false));
        assert_eq!(hit(Released, false, &all), None);

        assert_eq!(hit(Kept, true, &[Ended, Kept]), Some(true));
        assert_eq!(hit(Kept, true, &[Ended, Kept, Settled]), Some(false));
        assert_eq!(hit(Settled, true, &[Settled]), Some(true));
        assert_eq!(hit(Settled, true, &[Settled, Flipped]), Some(false));
        assert_eq!(hit(Flipped, true, &[Settled, Flipped]), Some(true));
        assert_eq!(hit(Flipped, true, &all), Some(false));
    }
}
