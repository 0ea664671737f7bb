//! Guests that one strategy after the other hands over, all on one lab.

use anyhow::{Context as _, Result, ensure};
use dataplane_probe::packets::PacketLog;
use kube::Api;
use kube::api::DeleteParams;

use crate::cluster::{Hook, Parts, Segue};
use crate::kubevirt::VirtualMachineInstanceMigration;
use crate::lab::{Lab, Progress};
use crate::report::{Baseline, Check, Environment, Migration};
use crate::scenario::{
    self, Expect, FoundBy, Gateway, Migrate, Outcome, PortsOf, Probe, Requested, Scenario,
    Strategy, Topology, Vm,
};

use super::conduct::segue_of;
use super::vm::{RunningVm, node_of};
use super::{Bench, Runner, migration, networks, vm};

/// Where the guests are and go.
const NODES: [&str; 2] = ["node1", "node2"];

/// A running lab with a guest for each kind of ports that the strategies need.
///
/// One of them moves at a time, between the same two nodes; the other idles. Its peer is on a third node.
pub struct Contest<'a> {
    runner: Runner<'a>,
    guests: Vec<Guest>,
}

/// A guest, and what there would be to say of it in a scenario.
struct Guest {
    scenario: Scenario,
    /// Its number in every subnet.
    host: u8,
    /// None where it could not be started.
    vm: Option<RunningVm>,
}

/// One migration.
#[derive(Clone, Debug)]
pub struct Switch {
    /// What was measured.
    pub migration: Migration,
    /// When the guest paused, in nanoseconds of Unix time.
    pub paused_ns: Option<u64>,
    /// Every packet, if the probe could be asked.
    pub packets: Option<PacketLog>,
}

impl<'a> Contest<'a> {
    /// Brings up what the strategies need. The calling process is in central's network namespace.
    ///
    /// # Errors
    /// When a part does not come up, or a guest does not answer.
    pub async fn start(
        lab: &'a Lab,
        parts: &Parts,
        topology: Topology,
        strategies: &[Strategy],
        progress: &dyn Progress,
    ) -> Result<Self> {
        let mut contest = Self {
            runner: Runner::start(lab, parts, progress).await?,
            guests: Vec::new(),
        };
        for (host, scenario) in (networks::FIRST_HOST..).zip(scenarios(topology, strategies)) {
            contest.runner.networks.prepare(&scenario).await?;
            contest.guests.push(Guest {
                scenario,
                host,
                vm: None,
            });
        }
        for number in 0..contest.guests.len() {
            contest.boot(number, progress).await?;
        }
        Ok(contest)
    }

    /// What the first guest carries without a migration: what is offered in every migration.
    ///
    /// # Errors
    /// When it cannot be measured.
    pub async fn baseline(&self, progress: &dyn Progress) -> Result<&Baseline> {
        let vm = self.guests.first().and_then(|guest| guest.vm.as_ref());
        self.runner.baseline(vm, progress).await
    }

    /// What it runs on.
    pub fn environment(&self) -> &Environment {
        &self.runner.environment
    }

    /// Moves the guest with the ports that a strategy needs to the other node.
    ///
    /// # Errors
    /// When something did not go as it must whoever hands over: the migration failed, the guest does not answer, the port
    /// did not come to rest. The guest is started anew then, before the next migration.
    pub async fn migrate(&mut self, strategy: Strategy, progress: &dyn Progress) -> Result<Switch> {
        let ports_of = ports_of(strategy);
        let mut guests = self.guests.iter();
        let number = guests.position(|guest| guest.scenario.ports_of == ports_of);
        let number = number.with_context(|| format!("no guest is there for {strategy}"))?;
        if self
            .guests
            .get(number)
            .is_none_or(|guest| guest.vm.is_none())
        {
            self.boot(number, progress).await?;
        }
        let rate_hz = self.baseline(progress).await?.rate_hz;
        let switched = self.switch(number, strategy, rate_hz).await;
        if switched.is_err()
            && let Some(guest) = self.guests.get_mut(number)
        {
            guest.vm = None;
        }
        switched
    }

    async fn switch(&self, number: usize, strategy: Strategy, rate_hz: u32) -> Result<Switch> {
        let guest = self.guests.get(number).context("no such guest")?;
        let vm = guest.vm.as_ref().context("the guest does not run")?;
        let cluster = &self.runner.cluster;
        cluster
            .run_segue(segue_of(strategy, Hook::default()))
            .await?;
        let node = node_of(cluster.client(), &vm.spec).await?;
        if strategy.is_segue() {
            // Whoever moved it last may have left its traffic with the other gateway.
            vm.placed_on(&self.runner.ovn, &node).await?;
        }
        let bench = Bench {
            lab: self.runner.lab,
            cluster,
            controller: cluster.controller.clone(),
            ovn: &self.runner.ovn,
            networks: &self.runner.networks,
            scenario: &guest.scenario,
            strategy,
            rate_hz,
            migrations: &self.runner.migrations,
            captures: None,
            out: None,
        };
        let migrate = Migrate {
            strategy: None,
            vm: vm.spec.name.clone(),
            to: other(&node).to_owned(),
            cancel_at: None,
            fail: None,
            kill_controller: None,
            agents: Vec::new(),
            target_stalls_ms: None,
            forge_at: None,
            delete_old_pods_at: None,
            restart_cni_at: None,
            // What it costs is the result, not a condition.
            expect: Expect {
                max_duplicated: None,
                ..Expect::default()
            },
        };
        let done = migration::run(&bench, vm, &migrate).await?;
        if !strategy.is_segue() {
            // segue, when it runs again, is not to find a migration that it has not seen.
            self.forget(&vm.spec, &done.name).await?;
        }
        ended_well(&done.migration, &done.checks)?;
        Ok(Switch {
            migration: done.migration,
            paused_ns: done.paused_ns,
            packets: done.packets,
        })
    }

    async fn forget(&self, vm: &Vm, migration: &str) -> Result<()> {
        let client = self.runner.cluster.client();
        let migrations: Api<VirtualMachineInstanceMigration> =
            Api::namespaced(client, &vm.namespace);
        match migrations.delete(migration, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            deleted => deleted
                .map(drop)
                .with_context(|| format!("delete migration {migration}")),
        }
    }

    /// Starts a guest, after removing what there may be of it.
    async fn boot(&mut self, number: usize, progress: &dyn Progress) -> Result<()> {
        let guest = self.guests.get_mut(number).context("no such guest")?;
        let spec = guest.scenario.vms.first().context("a guest without a VM")?;
        let (runner, topology) = (&self.runner, guest.scenario.topology);
        progress.step(&format!("Booting {} on {}", spec.key(), spec.node));
        let client = runner.cluster.client();
        vm::remove(client.clone(), &runner.networks, topology, spec).await?;
        let layout = guest.scenario.layout();
        let started = RunningVm::start(
            runner.lab,
            client,
            &runner.networks,
            &runner.ovn,
            layout,
            guest.host,
            spec,
        );
        let started = started.await?;
        self.runner.placed.extend(started.routed());
        guest.vm = Some(started);
        Ok(())
    }

    /// Removes the guests and ends the cluster; the lab stays.
    ///
    /// # Errors
    /// When something does not end, or what the guests were is left in OVN.
    pub async fn stop(self) -> Result<()> {
        let Self { runner, guests } = self;
        runner.cluster.run_segue(Segue::Controller).await?;
        for guest in guests {
            for spec in &guest.scenario.vms {
                let (client, topology) = (runner.cluster.client(), guest.scenario.topology);
                vm::remove(client, &runner.networks, topology, spec).await?;
            }
        }
        runner.stop().await
    }
}

/// Whose the ports are that a strategy hands over.
fn ports_of(strategy: Strategy) -> PortsOf {
    match strategy {
        Strategy::OvnKubernetes => PortsOf::Pod,
        _ => PortsOf::Vm,
    }
}

/// A scenario without steps for every guest that the strategies need.
fn scenarios(topology: Topology, strategies: &[Strategy]) -> Vec<Scenario> {
    let needed = |wanted: PortsOf| strategies.iter().any(|it| ports_of(*it) == wanted);
    let kinds = [(PortsOf::Vm, "web"), (PortsOf::Pod, "pods")];
    let kinds = kinds.into_iter().filter(|(kind, _)| needed(*kind));
    kinds
        .map(|(ports_of, name)| Scenario {
            name: name.to_owned(),
            about: String::new(),
            topology,
            strategy: Strategy::default(),
            cni: None,
            optimize: true,
            hook: scenario::Hook::default(),
            gateway: Gateway::default(),
            snat: false,
            ports_of,
            policies: Vec::new(),
            vms: vec![guest(name, ports_of)],
            probe: Probe::default(),
            flows: Vec::new(),
            capture: false,
            steps: Vec::new(),
        })
        .collect()
}

fn guest(name: &str, ports_of: PortsOf) -> Vm {
    let [first, _] = NODES;
    Vm {
        name: name.to_owned(),
        namespace: "demo".to_owned(),
        node: first.to_owned(),
        ports: 1,
        requested_chassis: Requested::Node,
        // What segue never hands over it is not to find while it runs.
        found_by: match ports_of {
            PortsOf::Vm => FoundBy::Label,
            PortsOf::Pod => FoundBy::Nothing,
        },
        isolated: false,
        memory_mib: 128,
    }
}

fn other(node: &str) -> &'static str {
    let [first, second] = NODES;
    if node == first { second } else { first }
}

/// A migration is no result unless it did what it is for.
fn ended_well(migration: &Migration, checks: &[Check]) -> Result<()> {
    ensure!(
        migration.outcome == Outcome::Succeeded,
        "the migration of {} from {} to {} ended {:?}",
        migration.vm,
        migration.source,
        migration.target,
        migration.outcome
    );
    let failed: Vec<_> = checks
        .iter()
        .filter_map(|check| {
            let failure = check.failure.as_ref()?;
            Some(format!("{}: {failure}", check.what))
        })
        .collect();
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Layout;

    #[test]
    fn there_is_a_guest_for_each_kind_of_ports_and_no_other() {
        let names = |strategies: &[Strategy]| -> Vec<_> {
            let scenarios = scenarios(Topology::Routed, strategies);
            scenarios
                .iter()
                .map(|scenario| (scenario.name.clone(), scenario.layout()))
                .collect()
        };
        let layout = |ports_of| Layout {
            topology: Topology::Routed,
            ports_of,
            cni: None,
        };
        assert_eq!(
            names(&Strategy::ALL),
            [
                ("web".to_owned(), layout(PortsOf::Vm)),
                ("pods".to_owned(), layout(PortsOf::Pod))
            ]
        );
        assert_eq!(
            names(&[Strategy::Single]),
            [("web".to_owned(), layout(PortsOf::Vm))]
        );
    }
}
