//! The flows of a VM, all watched at once and each measured on its own.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use dataplane_probe::packets::PacketLog;
use dataplane_probe::report as probe;
use dataplane_probe::run::Outcome;
use futures::future::try_join_all;

use crate::report::{self, Pause, Places};
use crate::scenario::{Family, Flow, FlowExpect, Opener, PRIMARY, Peer};

use super::Bench;
use super::forbidden::{Forbidding, SHUT};
use super::inside::{Measuring, REFLECTOR, listen};
use super::rate;
use super::validity;
use super::vm::RunningVm;

/// One flow in one address family.
#[derive(Clone, Debug)]
pub(super) struct Course {
    /// As in the report.
    name: String,
    /// As in the scenario.
    flow: String,
    peer: Peer,
    opened_by: Opener,
    family: Family,
    rate_hz: u32,
    /// Where it is opened to.
    target: SocketAddr,
}

/// The flows of a VM, being watched.
pub(super) struct Flows {
    measured: Vec<(Course, Measuring)>,
    forbidden: Vec<(Course, Forbidding)>,
    /// Packets a second over all of them.
    rate_hz: u32,
}

/// What came of them.
pub(super) struct Watched {
    measured: Vec<(Course, Outcome)>,
    forbidden: Vec<report::Forbidden>,
    /// Packets a second over all flows.
    rate_hz: u32,
}

/// What is known of a migration, for what its flows show.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known {
    /// When the guest did not run.
    pub pause: Option<Pause>,
    /// It runs again.
    pub resumed: Option<SystemTime>,
    /// What says where packets were lost.
    pub places: Places,
}

impl Course {
    /// The primary flow of a VM, and those that the scenario adds, except forbidden ones.
    fn of(bench: &Bench<'_>, vm: &RunningVm) -> Result<Vec<Self>> {
        let mut courses = Vec::new();
        for (number, &family) in bench.scenario.probe.family.each().iter().enumerate() {
            courses.push(Self::primary(bench, vm, family, number == 0)?);
        }
        for flow in bench.scenario.flows.iter().filter(|flow| !flow.forbidden) {
            for &family in flow.family.each() {
                courses.push(Self::of_flow(bench, vm, flow, family)?);
            }
        }
        let wanted: Vec<_> = courses.iter().map(|course| course.rate_hz).collect();
        for (course, share) in courses.iter_mut().zip(rate::shares(&wanted, bench.rate_hz)) {
            course.rate_hz = share;
        }
        Ok(courses)
    }

    fn primary(bench: &Bench<'_>, vm: &RunningVm, family: Family, first: bool) -> Result<Self> {
        let rate_hz = bench.scenario.probe.rate_hz;
        Ok(Self {
            name: if first {
                PRIMARY.to_owned()
            } else {
                format!("{PRIMARY}-{}", family.as_str())
            },
            flow: PRIMARY.to_owned(),
            peer: Peer::Client,
            opened_by: Opener::Peer,
            family,
            rate_hz: if first { rate_hz } else { rate_hz.div_ceil(10) },
            target: SocketAddr::new(vm.probed(family)?, REFLECTOR),
        })
    }

    fn of_flow(bench: &Bench<'_>, vm: &RunningVm, flow: &Flow, family: Family) -> Result<Self> {
        let target = match (&flow.through, flow.opened_by) {
            (Some(_), _) => vm.node_port(&flow.name, family)?,
            (None, Opener::Vm) => SocketAddr::new(bench.address_of(flow.peer, family)?, 0),
            (None, Opener::Peer) => SocketAddr::new(vm.probed_at(flow.port, family)?, REFLECTOR),
        };
        Ok(Self {
            target,
            ..Self::forbidden(vm, flow, family)?
        })
    }

    fn forbidden(vm: &RunningVm, flow: &Flow, family: Family) -> Result<Self> {
        Ok(Self {
            name: if flow.family == Family::Dual {
                format!("{}-{}", flow.name, family.as_str())
            } else {
                flow.name.clone()
            },
            flow: flow.name.clone(),
            peer: flow.peer,
            opened_by: flow.opened_by,
            family,
            rate_hz: flow.rate_hz,
            target: SocketAddr::new(vm.probed(family)?, SHUT),
        })
    }

    /// Begins to measure it. What the VM opens is controlled from the client: the way from the peer
    /// to the VM's own address may not be open.
    async fn start(mut self, bench: &Bench<'_>, vm: &RunningVm) -> Result<(Self, Measuring)> {
        let peer = bench.lab.host(self.peer.host())?;
        let mut config = rate::config(self.target, self.rate_hz);
        let mut host = peer;
        if self.opened_by == Opener::Vm {
            let callee = listen(peer, self.target.ip()).await?;
            self.target = callee.address();
            config.called_at = Some(callee);
            config.target = SocketAddr::new(vm.probed(self.family)?, REFLECTOR);
            host = bench.lab.host(Peer::Client.host())?;
        }
        let measuring = Measuring::start(host, config).await;
        let measuring = measuring.with_context(|| format!("flow {}", self.name))?;
        Ok((self, measuring))
    }
}

impl Flows {
    /// Begins to watch every flow of a VM that is, or may come to be, on these nodes.
    pub(super) async fn start(bench: &Bench<'_>, vm: &RunningVm, nodes: &[&str]) -> Result<Self> {
        let mut measured = Vec::new();
        for course in Course::of(bench, vm)? {
            measured.push(course.start(bench, vm).await?);
        }
        let mut forbidden = Vec::new();
        for course in forbidden_of(bench.scenario.flows.as_slice(), vm)? {
            let forbidding = forbid(bench, vm, &course, nodes)?;
            forbidden.push((course, forbidding));
        }
        Ok(Self {
            measured,
            forbidden,
            rate_hz: bench.rate_hz,
        })
    }

    /// The primary flow alone.
    pub(super) async fn primary(bench: &Bench<'_>, vm: &RunningVm) -> Result<Self> {
        let mut courses = Course::of(bench, vm)?.into_iter();
        let first = courses.next().context("a VM without flows")?;
        Ok(Self {
            measured: vec![first.start(bench, vm).await?],
            forbidden: Vec::new(),
            rate_hz: bench.rate_hz,
        })
    }

    /// Ends it.
    pub(super) async fn finish(self, vm: &RunningVm) -> Result<Watched> {
        let mut forbidden = Vec::new();
        for (course, forbidding) in self.forbidden {
            forbidden.push(report::Forbidden {
                tried: forbidding.finish().await?,
                proof: vm.proofs.get(&course.name).copied().unwrap_or_default(),
                name: course.name,
                peer: course.peer,
                target: course.target,
            });
        }
        // Each waits for what is on its way, so all at once.
        let ending = self
            .measured
            .into_iter()
            .map(|(course, measuring)| async { anyhow::Ok((course, measuring.finish().await?)) });
        Ok(Watched {
            measured: try_join_all(ending).await?,
            forbidden,
            rate_hz: self.rate_hz,
        })
    }
}

impl Watched {
    /// What the probe says of the primary flow.
    pub(super) fn primary(&self) -> Result<&probe::Report> {
        let (_, outcome) = self.measured.first().context("no flow was measured")?;
        Ok(&outcome.report)
    }

    /// Every flow, the primary one first, for the report.
    pub(super) fn flows(&self, known: Known) -> Vec<report::Flow> {
        let measured = self.measured.iter();
        measured
            .map(|(course, outcome)| course.report(outcome, known))
            .collect()
    }

    /// Why the figures are not the network's.
    pub(super) fn invalid(&self, flows: &[report::Flow], pause: Option<Pause>) -> Vec<String> {
        let of_flow = |flow: &report::Flow| {
            let reasons = flow.invalid.iter();
            let told = reasons.map(|reason| format!("flow {}: {reason}", flow.name));
            told.collect::<Vec<_>>()
        };
        let flows = flows.iter().flat_map(of_flow);
        flows
            .chain(validity::overfull(self.rate_hz, pause))
            .collect()
    }

    /// Every packet of the primary flow, unless the reflector could not be asked.
    pub(super) fn take_packets(&mut self) -> Option<PacketLog> {
        let (_, outcome) = self.measured.first_mut()?;
        outcome.packets.take()
    }

    /// Those that must not pass.
    pub(super) fn forbidden(&self) -> Vec<report::Forbidden> {
        self.forbidden.clone()
    }

    /// What is expected of each, in the order of [`flows`](Self::flows).
    pub(super) fn expected(&self, expect: &BTreeMap<String, FlowExpect>) -> Vec<FlowExpect> {
        let of_flow = |(course, _): &(Course, _)| expect.get(&course.flow).cloned();
        let flows = self.measured.iter();
        flows
            .map(|flow| of_flow(flow).unwrap_or_default())
            .collect()
    }
}

impl Course {
    fn report(&self, outcome: &Outcome, known: Known) -> report::Flow {
        let Outcome {
            report: measured,
            packets,
            ..
        } = outcome;
        let (to_vm, from_vm) = packets.as_ref().map_or((&[][..], &[][..]), |packets| {
            (&packets.to_vm, &packets.from_vm)
        });
        // Taps drop what goes to the guest.
        let from_guest = Places {
            dropped_by_taps: 0,
            ..known.places
        };
        let tcp = report::Tcp::of(measured, known.pause);
        let last = measured.tcp.as_ref().and_then(|tcp| tcp.last_echo_ns);
        let lived = known
            .resumed
            .zip(last)
            .map(|(resumed, last)| millis_from(resumed, last));
        report::Flow {
            name: self.name.clone(),
            peer: self.peer,
            opened_by: self.opened_by,
            target: self.target,
            family: self.family,
            to_vm: report::Direction::of(&measured.to_vm, to_vm, known.places),
            from_vm: report::Direction::of(&measured.from_vm, from_vm, from_guest),
            tcp_lived_ms: lived.filter(|_| !tcp.survived),
            tcp,
            new_connections: report::NewConnections::of(measured),
            heard_from: measured
                .callers
                .iter()
                .map(|caller| caller.address)
                .collect(),
            invalid: validity::reasons(measured, packets.as_ref(), known.pause),
        }
    }
}

/// Shows that each forbidden flow of a VM passes while nothing forbids it.
pub(super) async fn prove(bench: &Bench<'_>, vm: &mut RunningVm) -> Result<()> {
    /// Packets at their rate, and a few attempts to connect.
    const WHILE: Duration = Duration::from_millis(500);
    let node = vm.spec.node.clone();
    for course in forbidden_of(&bench.scenario.flows, vm)? {
        let forbidding = forbid(bench, vm, &course, &[&node])?;
        tokio::time::sleep(WHILE).await;
        let proof = forbidding.finish().await?;
        vm.proofs.insert(course.name, proof);
    }
    Ok(())
}

fn forbidden_of(flows: &[Flow], vm: &RunningVm) -> Result<Vec<Course>> {
    let mut courses = Vec::new();
    for flow in flows.iter().filter(|flow| flow.forbidden) {
        for &family in flow.family.each() {
            courses.push(Course::forbidden(vm, flow, family)?);
        }
    }
    Ok(courses)
}

fn forbid(
    bench: &Bench<'_>,
    vm: &RunningVm,
    course: &Course,
    nodes: &[&str],
) -> Result<Forbidding> {
    let from = bench.lab.host(course.peer.host())?;
    let nodes = nodes.iter().map(|node| bench.lab.host(node));
    let nodes = nodes.collect::<Result<Vec<_>>>()?;
    let nic = vm.nics.first().context("a VM without ports")?;
    let rate_hz = course.rate_hz.min(bench.rate_hz);
    Forbidding::start(from, course.target.ip(), rate_hz, &nodes, &nic.tap())
}

/// Milliseconds from one time to another, in nanoseconds of Unix time.
#[allow(
    clippy::cast_precision_loss,
    reason = "the difference of two times of one run is far below 2^52 ns"
)]
fn millis_from(from: SystemTime, to_ns: u64) -> f64 {
    let to = SystemTime::UNIX_EPOCH + Duration::from_nanos(to_ns);
    match to.duration_since(from) {
        Ok(after) => after.as_nanos() as f64 / 1e6,
        Err(before) => -(before.duration().as_nanos() as f64 / 1e6),
    }
}

/// An address of a peer that VMs call.
pub(super) fn of_family(
    addresses: impl IntoIterator<Item = IpAddr>,
    family: Family,
) -> Option<IpAddr> {
    let wanted = |address: &IpAddr| address.is_ipv4() == (family == Family::Ipv4);
    addresses.into_iter().find(wanted)
}
