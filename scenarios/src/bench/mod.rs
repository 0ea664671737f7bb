//! How long a flip takes as the number of VMs grows: from the commit to the flows.
//!
//! # What is measured
//! A real Northbound, Southbound and northd, and one node with a real ovn-controller and Open vSwitch, without guests.
//! The network is that of `docs/routed.md`; its other nodes are rows. It is loaded with more and more VMs, and at each
//! size one VM is flipped to the real node and back by each [`Method`] in turn, on the same database.
//!
//! # Guarantees
//! - Every flip carries the next `NB_Global.nb_cfg` in its own transaction, so what is waited for cannot be an earlier
//!   one's doing, and every time is taken by one process from one monotonic clock.
//! - After every flip the flows are read from the switch. One that is not what the flip must have led to ends the run.
//!
//! # Caveats
//! - The flows that must change are few. That a packet takes the new way is not tested here: scenarios do that.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ovsdb_rs::Transaction;

use crate::lab::{Host, INTEGRATION_BRIDGE, Lab, Progress};

pub mod blackout;
mod databases;
mod draw;
mod environment;
mod files;
mod flip;
mod layout;
mod plot;
mod results;
mod table;
mod world;

pub use files::{remove_old, write};
pub use flip::Method;
pub use plot::plot;
pub use results::{
    Check, Distribution, Environment, Figures, LARGE, Results, Row, SCHEMA, SMALL, Size,
};
pub use table::render;

use databases::{Databases, Times};
use flip::Direction;
use layout::{Vm, WATCHED};
use world::World;

/// From here on a flip is slow: so many of them as were asked for would take too long.
const SLOW: Duration = Duration::from_secs(5);
/// From here on not even [`ENOUGH`] of them can be waited for.
const HOPELESS: Duration = Duration::from_secs(20);
/// Rounds there and back that a percentile needs, even of slow flips.
const ENOUGH: usize = 25;

/// What is to be measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BenchSpec {
    /// The numbers of VMs, in ascending order.
    pub sizes: Vec<u32>,
    /// How many flips of each method with each number of VMs; every flip there is followed by one back.
    pub flips: usize,
    /// How long a method may take with one number of VMs where one flip takes five seconds or more: then there are
    /// fewer, but one there and one back in any case.
    pub patience: Duration,
}

/// One flip, or one change of nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// How many VMs there were.
    pub vms: u32,
    /// How; `None` for a change of nothing.
    pub method: Option<Method>,
    times: Times,
}

/// What there is to know of a run so far.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The figures.
    pub results: Results,
    /// What they were computed from, in the order in which it happened.
    pub samples: Vec<Sample>,
}

/// A run under way.
struct Bench<'a> {
    spec: &'a BenchSpec,
    node: &'a Host,
    progress: &'a dyn Progress,
    databases: Databases,
    world: World,
    measured: Measured,
}

// === impl BenchSpec ===

impl BenchSpec {
    /// # Errors
    /// When it cannot be run as it is.
    pub fn validate(&self) -> Result<()> {
        ensure!(
            self.sizes.is_sorted_by(|a, b| a < b) && !self.sizes.is_empty(),
            "give the numbers of VMs in ascending order"
        );
        ensure!(
            self.sizes.iter().all(|size| (2..=Vm::MOST).contains(size)),
            "a number of VMs is from 2 to {}",
            Vm::MOST
        );
        ensure!(self.flips > 0, "give the number of flips");
        environment::ensure_memory(self.sizes.last().copied().unwrap_or_default())
    }
}

/// Runs it on a lab with one node, which must be fresh. `done` gets what has been measured whenever another number of
/// VMs is done.
///
/// # Errors
/// When a flip does not have the effect that it must have, the lab fails, or `done` does.
pub async fn run(
    lab: &Lab,
    spec: &BenchSpec,
    progress: &dyn Progress,
    mut done: impl FnMut(&Measured) -> Result<()>,
) -> Result<Measured> {
    spec.validate()?;
    let mut databases = Databases::connect(lab).await?;
    progress.step("Writing the network");
    world::be_patient(lab).await?;
    let world = World::lay_out(&databases).await?;
    databases.settle().await?;
    let mut bench = Bench {
        spec,
        node: lab.host(&WATCHED.name())?,
        progress,
        databases,
        world,
        measured: Measured {
            results: Results::new(environment::of(lab)?),
            samples: Vec::new(),
        },
    };
    for &vms in &spec.sizes {
        bench.load(lab, vms).await?;
        for method in Method::ALL {
            bench.measure(vms, method).await?;
        }
        bench.measured.results.check();
        done(&bench.measured)?;
    }
    Ok(bench.measured)
}

// === impl Bench ===

impl Bench<'_> {
    /// Adds VMs, and measures what a change of nothing takes then.
    async fn load(&mut self, lab: &Lab, vms: u32) -> Result<()> {
        let size = table::grouped(vms.into());
        self.progress.step(&format!("Loading {size} VMs"));
        let start = Instant::now();
        let progress = self.progress;
        let of = |added| progress.detail(&format!("{} written", table::grouped(u64::from(added))));
        self.world.grow(&self.databases, vms, of).await?;
        progress.detail("northd compiles");
        self.databases.settle().await?;
        self.world.bind(&self.databases).await?;
        if self.measured.results.sizes.is_empty() {
            world::plug(lab).await?;
        }
        progress.detail("ovn-controller installs");
        self.databases.settle().await?;
        let load_s = start.elapsed().as_secs_f64();
        let openflow_flows = flow_count(self.node).await?;
        progress.detail("a change of nothing");
        // ovn-controller tidies up after the many flows, and northd after ovn-controller.
        self.databases.settle().await?;
        let mut times = Vec::new();
        for _ in 0..self.spec.flips {
            times.push(self.databases.commit(Transaction::new()).await?);
        }
        self.keep(vms, None, &times);
        self.measured.results.sizes.push(Size {
            vms,
            load_s,
            openflow_flows,
            nothing: Figures::of(&times)?,
        });
        Ok(())
    }

    async fn measure(&mut self, vms: u32, method: Method) -> Result<()> {
        let size = table::grouped(vms.into());
        self.progress
            .step(&format!("Flipping by {method} with {size} VMs"));
        let mut times = self.round(method).await?;
        // The shorter: one that something else delayed is no reason to make fewer.
        let one = times.iter().map(|times| times.longest()).min();
        let rounds = self.spec.rounds(one.unwrap_or_default());
        if rounds.is_slow {
            progress_of(self.progress, 1, rounds.number);
        } else {
            // The first one fills caches.
            times.clear();
        }
        while times.len() < 2 * rounds.number {
            times.extend(self.round(method).await?);
            progress_of(self.progress, times.len() / 2, rounds.number);
        }
        self.keep(vms, Some(method), &times);
        self.measured.results.rows.push(Row {
            vms,
            method,
            figures: Figures::of(&times)?,
        });
        Ok(())
    }

    /// There and back.
    async fn round(&mut self, method: Method) -> Result<Vec<Times>> {
        let mut times = Vec::new();
        for direction in Direction::ROUND {
            times.push(self.flip(method, direction).await?);
        }
        Ok(times)
    }

    /// One flip, begun when nothing else is under way, and checked.
    async fn flip(&mut self, method: Method, direction: Direction) -> Result<Times> {
        self.databases.settle().await?;
        let change = method.transaction(&self.world, direction)?;
        let times = self.databases.commit(change).await?;
        method
            .check(&mut self.databases, self.node, direction)
            .await?;
        Ok(times)
    }

    fn keep(&mut self, vms: u32, method: Option<Method>, times: &[Times]) {
        let samples = times.iter().map(|times| Sample {
            vms,
            method,
            times: *times,
        });
        self.measured.samples.extend(samples);
    }
}

impl BenchSpec {
    /// How often to go there and back where one flip takes so long.
    fn rounds(&self, one: Duration) -> Rounds {
        let is_slow = one >= SLOW;
        let mut number = self.flips.div_ceil(2);
        if is_slow {
            let affordable = self.patience.as_secs() / (2 * one.as_secs()).max(1);
            let least = if one < HOPELESS { ENOUGH } else { 1 };
            number = number.min(usize::try_from(affordable).unwrap_or(usize::MAX).max(least));
        }
        Rounds { number, is_slow }
    }
}

/// How often to go there and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rounds {
    number: usize,
    /// Too slow for one that does not count.
    is_slow: bool,
}

fn progress_of(progress: &dyn Progress, done: usize, rounds: usize) {
    progress.detail(&format!("{} of {} flips", 2 * done, 2 * rounds));
}

async fn flow_count(node: &Host) -> Result<u64> {
    let args = ["-OOpenFlow15", "dump-aggregate", INTEGRATION_BRIDGE];
    let text = node.run("ovs-ofctl", args).await?;
    let (_, count) = text
        .rsplit_once("flow_count=")
        .with_context(|| format!("no flow count in {text:?}"))?;
    count.trim().parse().context("flow count")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(flips: usize) -> BenchSpec {
        BenchSpec {
            sizes: vec![100],
            flips,
            patience: Duration::from_mins(5),
        }
    }

    #[test]
    fn slow_flips_are_made_as_often_as_patience_allows_and_the_others_as_often_as_was_asked() {
        for (flips, seconds, rounds, is_slow) in [
            (100, 4, 50, false),
            (3, 4, 2, false),
            (100, 6, 25, true),
            (100, 15, 25, true),
            (10, 6, 5, true),
            (100, 400, 1, true),
        ] {
            let planned = spec(flips).rounds(Duration::from_secs(seconds));
            let number = rounds;
            assert_eq!(
                planned,
                Rounds { number, is_slow },
                "{flips} of {seconds} s"
            );
        }
    }

    #[test]
    fn sizes_that_cannot_be_had_are_refused() {
        for sizes in [
            vec![],
            vec![1],
            vec![100, 100],
            vec![1000, 100],
            vec![u32::MAX],
        ] {
            let spec = BenchSpec { sizes, ..spec(2) };
            assert!(spec.validate().is_err(), "{spec:?} was accepted");
        }
        spec(2).validate().unwrap();
        assert!(spec(0).validate().is_err());
    }
}
