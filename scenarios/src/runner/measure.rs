//! Measurements without a migration: that the probe tells the truth.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::sleep;

use crate::report::{Check, Direction, Measurement};
use crate::scenario::{Outage, Quiet};

use super::Bench;
use super::checks::{self, Checks};
use super::dropping::drop_for;
use super::flows::{Flows, Known, Watched};
use super::inside::REFLECTOR;
use super::vm::{RunningVm, node_of};

/// Measured before and after an outage.
const MARGIN: Duration = Duration::from_secs(2);

/// What came of a measurement.
pub(super) struct Done {
    pub measurement: Measurement,
    pub checks: Vec<Check>,
}

/// Nothing happens, and nothing must be reported.
pub(super) async fn quiet(bench: &Bench<'_>, vm: &RunningVm, quiet: &Quiet) -> Result<Done> {
    let node = node_of(bench.cluster.client(), &vm.spec).await?;
    let flows = Flows::start(bench, vm, &[&node]).await?;
    sleep(Duration::from_secs(quiet.seconds.into())).await;
    let watched = flows.finish(vm).await?;
    let measurement = measurement(format!("{} s of nothing", quiet.seconds), vm, &watched)?;
    let mut checks = Checks::default();
    for (way, direction) in [
        ("towards", &measurement.to_vm),
        ("from", &measurement.from_vm),
    ] {
        let what = format!("nothing is lost or duplicated {way} {}", measurement.vm);
        checks.that(
            what,
            direction.lost == 0 && direction.duplicated == 0,
            || {
                format!(
                    "{} lost, {} duplicated of {}",
                    direction.lost, direction.duplicated, direction.sent
                )
            },
        );
    }
    arrived(&mut checks, &measurement);
    let expected = watched.expected(&BTreeMap::new());
    checks::flows(&mut checks, &measurement.vm, &measurement.flows, &expected);
    checks::forbidden(&mut checks, &measurement.vm, &measurement.forbidden);
    Ok(Done {
        measurement,
        checks: checks.0,
    })
}

/// The client's link drops everything for a while, and exactly that must be reported: the kernel
/// counts what it drops.
pub(super) async fn outage(bench: &Bench<'_>, vm: &RunningVm, outage: &Outage) -> Result<Done> {
    let client = bench.lab.host("client")?;
    let flows = Flows::primary(bench, vm).await?;
    sleep(MARGIN).await;
    let time = Duration::from_millis(outage.ms.into());
    let dropped = drop_for(client, REFLECTOR, time).await?;
    sleep(MARGIN).await;
    let watched = flows.finish(vm).await?;

    let measurement = measurement(format!("{} ms outage", outage.ms), vm, &watched)?;
    let mut checks = Checks::default();
    seen(
        &mut checks,
        "towards",
        &measurement.vm,
        dropped.to_vm,
        &measurement.to_vm,
    );
    seen(
        &mut checks,
        "from",
        &measurement.vm,
        dropped.from_vm,
        &measurement.from_vm,
    );
    arrived(&mut checks, &measurement);
    Ok(Done {
        measurement,
        checks: checks.0,
    })
}

/// What the kernel dropped must be what the probe reports: as many packets, in one run.
fn seen(checks: &mut Checks, way: &str, vm: &str, dropped: u64, direction: &Direction) {
    #[allow(
        clippy::cast_precision_loss,
        reason = "a period and so few packets are far below 2^52"
    )]
    let (period_ms, outage_ms) = {
        let period_ms = direction.period_us as f64 / 1_000.0;
        (period_ms, dropped as f64 * period_ms)
    };
    checks.that(
        format!("packets {way} {vm} were dropped"),
        dropped > 0,
        || "the outage hit nothing".to_owned(),
    );
    checks.that(
        format!("the outage of {outage_ms} ms {way} {vm} is reported to within a period"),
        (direction.longest_loss_ms - outage_ms).abs() <= period_ms,
        || format!("{} ms", direction.longest_loss_ms),
    );
    checks.that(
        format!("nothing but the {dropped} packets dropped is lost {way} {vm}"),
        direction.lost == dropped,
        || format!("{} lost", direction.lost),
    );
}

fn measurement(what: String, vm: &RunningVm, watched: &Watched) -> Result<Measurement> {
    let flows = watched.flows(Known::default());
    let primary = flows.first().context("no flow was measured")?.clone();
    Ok(Measurement {
        what,
        vm: vm.spec.key(),
        to_vm: primary.to_vm,
        from_vm: primary.from_vm,
        tcp: primary.tcp,
        new_connections: primary.new_connections,
        forbidden: watched.forbidden(),
        invalid: watched.invalid(&flows, None),
        flows,
    })
}

fn arrived(checks: &mut Checks, measurement: &Measurement) {
    let vm = &measurement.vm;
    for (way, direction) in [
        ("towards", &measurement.to_vm),
        ("from", &measurement.from_vm),
    ] {
        checks.that(
            format!("packets {way} {vm} arrived"),
            direction.received > 0,
            || format!("{} of {}", direction.received, direction.sent),
        );
    }
    checks.that(
        format!("the TCP stream of {vm} survives"),
        measurement.tcp.survived,
        || "it broke".to_owned(),
    );
}
