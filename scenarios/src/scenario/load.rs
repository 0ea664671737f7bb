//! Reading a scenario file, and saying what is wrong with it and where.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use dataplane_probe::run::MAX_RATE_HZ;

use super::{
    AgentFaultKind, Cni, Family, Flow, FoundBy, Gateway, Hook, Migrate, Opener, Peer, PortsOf,
    Requested, Scenario, Step, Strategy, Topology,
};

/// A scenario file that cannot be run.
///
/// `Display` says what is wrong in one line; `Debug` shows the file with the place marked, for a
/// terminal.
pub struct ScenarioError {
    path: PathBuf,
    what: String,
    shown: Option<miette::Report>,
}

impl fmt::Display for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.what)
    }
}

impl fmt::Debug for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.shown {
            Some(report) => fmt::Debug::fmt(report, f),
            None => fmt::Display::fmt(self, f),
        }
    }
}

impl std::error::Error for ScenarioError {}

/// Reads and checks a scenario file.
///
/// # Errors
///
/// The file cannot be read, is not YAML, has an unknown key or a wrong type (with line and column),
/// or refers to a VM or node that there is not.
pub fn load(path: &Path) -> Result<Scenario, ScenarioError> {
    let text = std::fs::read_to_string(path).map_err(|error| ScenarioError {
        path: path.to_owned(),
        what: format!("cannot be read: {error}"),
        shown: None,
    })?;
    parse(path, &text)
}

/// [`load`] for text that is in hand; `path` is for messages.
pub(super) fn parse(path: &Path, text: &str) -> Result<Scenario, ScenarioError> {
    let mut scenario: Scenario = serde_saphyr::from_str(text).map_err(|error| {
        let place = error.location().map_or_else(String::new, |place| {
            format!("line {}, column {}: ", place.line(), place.column())
        });
        let shown =
            serde_saphyr::miette::to_miette_report(&error, text, &path.display().to_string());
        ScenarioError {
            path: path.to_owned(),
            what: format!("{place}{}", error.without_snippet()),
            shown: Some(shown),
        }
    })?;
    check(&scenario).map_err(|what| ScenarioError {
        path: path.to_owned(),
        what,
        shown: None,
    })?;
    for vm in &mut scenario.vms {
        if let Some(Cni::KubeOvn) = scenario.cni {
            vm.found_by = FoundBy::KubeOvnName;
            vm.requested_chassis = Requested::Unset;
        }
    }
    Ok(scenario)
}

/// Nodes that guests start on. The lab's last node carries the client, so that what is measured
/// crosses the underlay before and after.
const GUEST_NODES: [&str; 2] = ["node1", "node2"];
/// The last node; a guest in the routed topology, which needs a third place to go to, may visit it.
const LAST_NODE: &str = "node3";
/// The name of the primary flow.
pub const PRIMARY: &str = "east-west";

fn check(scenario: &Scenario) -> Result<(), String> {
    if !is_name(&scenario.name) {
        return Err(format!(
            "name {:?}: lower-case letters, digits and dashes only",
            scenario.name
        ));
    }
    if scenario.vms.is_empty() || scenario.steps.is_empty() {
        return Err("a scenario has at least one VM and one step".to_owned());
    }
    check_topology(scenario)?;
    check_strategy(scenario).map_err(|why| format!("strategy {}: {why}", scenario.strategy))?;
    check_cni(scenario).map_err(|why| format!("cni: {why}"))?;
    check_agents(scenario)?;
    let mut names = BTreeSet::new();
    for vm in &scenario.vms {
        if !is_name(&vm.name) || !is_name(&vm.namespace) {
            return Err(format!("VM {}: not a Kubernetes name", vm.key()));
        }
        if !names.insert(vm.name.as_str()) {
            return Err(format!("VM {}: there are two of that name", vm.name));
        }
        one_of(&vm.node, &GUEST_NODES)?;
        if !(1..=2).contains(&vm.ports) {
            return Err(format!("VM {}: it can have 1 or 2 ports", vm.name));
        }
    }
    let mut flows = BTreeSet::from([PRIMARY]);
    for flow in &scenario.flows {
        if !is_name(&flow.name) || !flows.insert(&flow.name) {
            return Err(format!(
                "flow {:?}: flows have names of their own, of lower-case letters, digits and dashes",
                flow.name
            ));
        }
        check_flow(flow, scenario).map_err(|why| format!("flow {}: {why}", flow.name))?;
    }
    for step in &scenario.steps {
        check_step(step, scenario)?;
    }
    Ok(())
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .chars()
            .all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-')
}

/// What only the routed topology has.
fn check_topology(scenario: &Scenario) -> Result<(), String> {
    if scenario.topology == Topology::Routed {
        return check_ports_of(scenario);
    }
    let outside = |flow: &Flow| flow.peer == Peer::Outside || flow.through.is_some();
    for (what, there) in [
        ("gateway", scenario.gateway != Gateway::default()),
        ("snat", scenario.snat),
        ("ports_of", scenario.ports_of != PortsOf::default()),
        (
            "a flow with the outside",
            scenario.flows.iter().any(outside),
        ),
    ] {
        if there {
            return Err(format!("{what}: only with `topology: routed`"));
        }
    }
    Ok(())
}

/// A pod's port is named, labelled and pinned to its node by whoever makes it.
fn check_ports_of(scenario: &Scenario) -> Result<(), String> {
    if scenario.ports_of == PortsOf::Vm {
        return Ok(());
    }
    let others = scenario.vms.iter().find(|vm| {
        vm.requested_chassis != Requested::default() || vm.found_by != FoundBy::default()
    });
    match others {
        Some(vm) => Err(format!(
            "VM {}: with `ports_of: pod` its ports are labelled, and request their node",
            vm.name
        )),
        None => Ok(()),
    }
}

/// What a peer's sequence of writes is replayed on, and what has no meaning then.
fn check_strategy(scenario: &Scenario) -> Result<(), String> {
    if scenario.strategy.is_segue() {
        return Ok(());
    }
    if !scenario.policies.is_empty() {
        return Err("policies are segue's, which does not run".to_owned());
    }
    if scenario.ports_of != PortsOf::default() {
        return Err("whose the ports are follows from the strategy, leave out ports_of".to_owned());
    }
    for vm in &scenario.vms {
        if vm.requested_chassis != Requested::Node {
            let name = &vm.name;
            return Err(format!(
                "VM {name}: its ports have to request their node before"
            ));
        }
        if scenario.strategy == Strategy::OvnKubernetes && vm.ports > 1 {
            return Err(format!("VM {}: only its first port is its pods'", vm.name));
        }
    }
    for migrate in migrations(scenario) {
        if migrate.kill_controller.is_some() {
            return Err("there is no controller to kill".to_owned());
        }
    }
    Ok(())
}

/// A migration's own strategy: agents come and go, whose the ports are does not.
fn check_own_strategy(migrate: &Migrate, scenario: &Scenario) -> Result<(), String> {
    match migrate.strategy {
        Some(own) if !(own.is_segue() && scenario.strategy.is_segue()) => Err(format!(
            "VM {}: strategy {own}: within a scenario only segue and segue-agentless take turns",
            migrate.vm
        )),
        _ => Ok(()),
    }
}

/// What goes with a CNI of the VMs' ports, and what only goes with one.
fn check_cni(scenario: &Scenario) -> Result<(), String> {
    if scenario.cni.is_none() {
        let restarts = migrations(scenario).any(|migrate| migrate.restart_cni_at.is_some());
        return match (scenario.optimize, restarts) {
            (true, false) => Ok(()),
            (false, _) => Err("there is none that optimizes, leave out optimize".to_owned()),
            (_, true) => Err("there is no controller to restart".to_owned()),
        };
    }
    if scenario.topology != Topology::Shared {
        return Err("only with `topology: shared`".to_owned());
    }
    if !scenario.strategy.is_segue() {
        return Err("it writes beside segue, leave out the strategy of others".to_owned());
    }
    for vm in &scenario.vms {
        let own = vm.found_by != FoundBy::default() || vm.requested_chassis != Requested::default();
        if own {
            let name = &vm.name;
            return Err(format!(
                "VM {name}: found_by and requested_chassis follow from it, leave them out"
            ));
        }
    }
    Ok(())
}

fn migrations(scenario: &Scenario) -> impl Iterator<Item = &Migrate> {
    scenario.steps.iter().flat_map(|step| match step {
        Step::Migrate(migrate) => std::slice::from_ref(&**migrate),
        Step::Together(migrations) => migrations,
        Step::Quiet(_) | Step::Outage(_) | Step::Forge(_) => &[],
    })
}

/// What only a lab with agents has, and what can be done to them.
fn check_agents(scenario: &Scenario) -> Result<(), String> {
    let forges = |step: &Step| matches!(step, Step::Forge(_));
    let mut needs = vec![
        ("hook", scenario.hook != Hook::default()),
        ("forge", scenario.steps.iter().any(forges)),
    ];
    for migrate in migrations(scenario) {
        check_own_strategy(migrate, scenario)?;
        let expect = &migrate.expect;
        needs.extend([
            ("agents", !migrate.agents.is_empty()),
            ("forge_at", migrate.forge_at.is_some()),
            ("forgeries", expect.forgeries.is_some()),
            ("held_at_least_ms", expect.held_at_least_ms.is_some()),
            ("lost_until_open_ms", expect.lost_until_open_ms.is_some()),
        ]);
        let mut nodes = BTreeSet::new();
        for fault in &migrate.agents {
            let (node, again_at) = (&fault.node, fault.again_at);
            one_of(node, &[GUEST_NODES.as_slice(), &[LAST_NODE]].concat())?;
            if !nodes.insert(node) {
                return Err(format!("agent of {node}: one thing at a time"));
            }
            match (fault.what, fault.at) {
                (AgentFaultKind::Absent, Some(_)) => {
                    return Err(format!(
                        "agent of {node}: absent from the beginning, leave out at"
                    ));
                }
                (AgentFaultKind::Absent, None) => {}
                (_, None) => return Err(format!("agent of {node}: at which moment?")),
                (_, Some(at)) if again_at < at => {
                    return Err(format!("agent of {node}: again_at comes before at"));
                }
                _ => {}
            }
        }
    }
    match needs.into_iter().find(|(_, needed)| *needed) {
        Some((key, _)) if scenario.strategy != Strategy::Segue => {
            Err(format!("{key}: only with `strategy: segue`"))
        }
        _ => Ok(()),
    }
}

fn check_flow(flow: &Flow, scenario: &Scenario) -> Result<(), String> {
    let by_vm = flow.opened_by == Opener::Vm;
    if let Some(vm) = scenario.vms.iter().find(|vm| vm.ports <= flow.port) {
        return Err(format!("VM {} has no port {}", vm.name, flow.port));
    }
    let plain = flow.peer == Peer::Client && !by_vm && !flow.forbidden;
    if flow.port > 0 && !plain {
        return Err("with the second port there is only what the client opens".to_owned());
    }
    if let Some(node) = &flow.through {
        one_of(node, &nodes(scenario.topology))?;
        if by_vm || flow.peer != Peer::Outside {
            return Err(
                "through a gateway's load balancer comes what the outside opens".to_owned(),
            );
        }
        if scenario.vms.len() > 1 {
            return Err("a load balancer has one VM behind it".to_owned());
        }
    }
    if flow.forbidden {
        if by_vm || flow.through.is_some() {
            return Err(
                "what is forbidden is what the peer sends to the VM's own address".to_owned(),
            );
        }
        if let Some(vm) = scenario.vms.iter().find(|vm| !vm.isolated) {
            return Err(format!(
                "nothing forbids it: VM {} is not `isolated: true`",
                vm.name
            ));
        }
    }
    let translated = scenario.snat && flow.peer == Peer::Outside && flow.family != Family::Ipv6;
    if translated && !by_vm && flow.through.is_none() {
        return Err(
            "with `snat` the guests' own addresses cannot be reached from outside".to_owned(),
        );
    }
    (1..=MAX_RATE_HZ)
        .contains(&flow.rate_hz)
        .then_some(())
        .ok_or_else(|| format!("rate_hz is 1 to {MAX_RATE_HZ}"))
}

fn check_step(step: &Step, scenario: &Scenario) -> Result<(), String> {
    let known = |vm: &str| {
        let vms = &scenario.vms;
        vms.iter()
            .any(|there| there.name == vm)
            .then_some(())
            .ok_or_else(|| format!("a step names VM {vm:?}, which is not among the vms"))
    };
    match step {
        Step::Migrate(migrate) => {
            known(&migrate.vm).and_then(|()| check_migrate(migrate, scenario))
        }
        Step::Together(migrations) => {
            let mut moving = BTreeSet::new();
            for migrate in migrations {
                known(&migrate.vm)?;
                check_migrate(migrate, scenario)?;
                if migrate.strategy.is_some() {
                    return Err(format!(
                        "VM {}: migrations at the same time have one strategy",
                        migrate.vm
                    ));
                }
                if migrate.kill_controller.is_some() {
                    return Err(format!(
                        "VM {}: the controller is killed in a migration that is alone",
                        migrate.vm
                    ));
                }
                if !moving.insert(&migrate.vm) {
                    return Err(format!("VM {} cannot migrate twice at once", migrate.vm));
                }
            }
            if moving.is_empty() {
                return Err("together: names no migration".to_owned());
            }
            Ok(())
        }
        Step::Quiet(quiet) => known(&quiet.vm),
        Step::Outage(outage) => known(&outage.vm),
        Step::Forge(forge) => known(&forge.vm),
    }
}

fn check_migrate(migrate: &Migrate, scenario: &Scenario) -> Result<(), String> {
    if migrate.cancel_at.is_some() && migrate.fail.is_some() {
        return Err(format!(
            "VM {}: a migration is cancelled or fails, not both",
            migrate.vm
        ));
    }
    for (name, expect) in &migrate.expect.flows {
        let flow = scenario.flows.iter().find(|flow| flow.name == *name);
        let Some(flow) = flow.filter(|flow| !flow.forbidden) else {
            return Err(format!(
                "a migration of {} expects something of flow {name:?}, which is not among the flows \
                 that are measured",
                migrate.vm
            ));
        };
        if expect.heard_from.is_some() && flow.opened_by != Opener::Vm {
            return Err(format!("flow {name}: heard_from is of what the VM opens"));
        }
    }
    one_of(&migrate.to, &nodes(scenario.topology))
}

/// Where guests can go.
fn nodes(topology: Topology) -> Vec<&'static str> {
    let mut nodes = GUEST_NODES.to_vec();
    if topology == Topology::Routed {
        nodes.push(LAST_NODE);
    }
    nodes
}

fn one_of(name: &str, nodes: &[&str]) -> Result<(), String> {
    nodes
        .contains(&name)
        .then_some(())
        .ok_or_else(|| format!("node {name:?}: it can be {}", nodes.join(" or ")))
}

#[cfg(test)]
mod tests;
