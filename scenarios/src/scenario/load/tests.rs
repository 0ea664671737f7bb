use super::*;
use crate::scenario::{Moment, Outcome};

const GOOD: &str = "\
name: one
about: One VM moves.
vms:
  - {name: web, node: node1}
steps:
  - migrate: {vm: web, to: node2}
";

fn error(text: &str) -> String {
    parse(Path::new("x.yaml"), text)
        .expect_err("the file is wrong")
        .to_string()
}

#[test]
fn what_is_not_said_has_a_default() {
    let scenario = parse(Path::new("x.yaml"), GOOD).unwrap();
    assert_eq!(scenario.vms[0].key(), "demo/web");
    assert_eq!(scenario.probe.rate_hz, 1_000);
    let Step::Migrate(migrate) = &scenario.steps[0] else {
        panic!("a migration");
    };
    assert_eq!(migrate.expect.outcome, Outcome::Succeeded);
}

#[test]
fn a_migration_says_what_happens_to_it() {
    let text = GOOD.replace(
        "to: node2}",
        "to: node2, kill_controller: {at: paused, restart_at: ended}, \
         expect: {outcome: RolledBack, to_vm_max_lost_ms: 3}}",
    );
    let scenario = parse(Path::new("x.yaml"), &text).unwrap();
    let Step::Migrate(migrate) = &scenario.steps[0] else {
        panic!("a migration");
    };
    let kill = migrate.kill_controller.unwrap();
    assert_eq!(
        (kill.at, kill.restart_at),
        (Moment::Paused, Some(Moment::Ended))
    );
    assert_eq!(migrate.expect.to_vm_max_lost_ms, Some(3));
}

#[test]
fn every_file_that_ships_can_be_run() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("files");
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let scenario = load(&path).unwrap();
        assert_eq!(
            path.file_stem().unwrap().to_str(),
            Some(scenario.name.as_str())
        );
        names.insert(scenario.name);
    }
    assert!(names.contains("one-migration"), "{names:?}");
}

#[test]
fn an_unknown_key_shows_its_place() {
    let message = error(&GOOD.replace("to: node2", "too: node2"));
    assert!(
        message.starts_with("x.yaml: line 6, column 24: "),
        "{message}"
    );
    assert!(message.contains("too"), "{message}");
}

#[test]
fn a_wrong_type_shows_its_place() {
    let message = error(&GOOD.replace("node: node1", "node: node1, ports: many"));
    assert!(message.starts_with("x.yaml: line 4, column "), "{message}");
}

#[test]
fn what_refers_to_nothing_is_named() {
    for (from, to, needle) in [
        ("vm: web", "vm: wob", "wob"),
        ("to: node2", "to: node7", "node7"),
        ("node: node1", "node: node3", "node3"),
        ("name: one", "name: One more", "One more"),
    ] {
        let message = error(&GOOD.replace(from, to));
        assert!(message.contains(needle), "{message}");
    }
}

const ROUTED: &str = "\
name: two
about: One VM moves and is called from outside.
topology: routed
snat: true
policies:
  - {name: keep, spec: {routing: {keepEgressSeconds: 5}}}
vms:
  - {name: web, node: node1, isolated: true}
flows:
  - {name: out, peer: outside, opened_by: vm}
  - {name: shut, forbidden: true, rate_hz: 500}
  - {name: port, peer: outside, through: node1}
steps:
  - migrate: {vm: web, to: node3, expect: {flows: {out: {tcp_survives: false, heard_from: [node1]}}}}
";

#[test]
fn a_strategy_says_whose_the_ports_are() {
    let of = |strategy: &str| {
        let text = GOOD.replace("name: one\n", &format!("name: one\nstrategy: {strategy}\n"));
        parse(Path::new("x.yaml"), &text).unwrap()
    };
    assert_eq!(
        parse(Path::new("x.yaml"), GOOD).unwrap().strategy,
        Strategy::Segue
    );
    assert_eq!(of("kube-ovn").layout().ports_of, PortsOf::Vm);
    assert_eq!(of("ovn-kubernetes").layout().ports_of, PortsOf::Pod);
}

#[test]
fn a_migration_has_a_strategy_of_its_own_where_it_can() {
    let own = |text: &str, strategy: &str| {
        text.replace("to: node2", &format!("to: node2, strategy: {strategy}"))
    };
    let scenario = parse(Path::new("x.yaml"), &own(GOOD, "segue-agentless")).unwrap();
    let Step::Migrate(migrate) = &scenario.steps[0] else {
        panic!("a migration");
    };
    assert_eq!(migrate.strategy, Some(Strategy::SegueAgentless));
    let replayed = GOOD.replace("name: one\n", "name: one\nstrategy: neutron\n");
    let together = GOOD
        .replace("migrate: {", "together: [{")
        .replace("node2}", "node2}]");
    for wrong in [
        own(GOOD, "neutron"),
        own(&replayed, "segue"),
        own(&together, "segue"),
    ] {
        let message = error(&wrong);
        assert!(message.contains("strategy"), "{message}");
    }
}

#[test]
fn what_a_replayed_strategy_cannot_have_is_refused() {
    let good = GOOD.replace("name: one\n", "name: one\nstrategy: neutron\n");
    for (from, to, needle) in [
        ("strategy: neutron", "strategy: newton", "newton"),
        (
            "to: node2",
            "to: node2, kill_controller: {at: paused}",
            "no controller",
        ),
        (
            "node: node1",
            "node: node1, requested_chassis: unset",
            "request their node",
        ),
        ("vms:", "policies: [{name: p, spec: {}}]\nvms:", "segue's"),
    ] {
        let message = error(&good.replace(from, to));
        assert!(message.contains(needle), "{message}");
    }
    let two = GOOD
        .replace("name: one\n", "name: one\nstrategy: ovn-kubernetes\n")
        .replace("node: node1", "node: node1, ports: 2");
    assert!(error(&two).contains("only its first port"));
}

#[test]
fn flows_have_defaults_and_expectations() {
    let scenario = parse(Path::new("x.yaml"), ROUTED).unwrap();
    assert_eq!(scenario.policies[0].spec["routing"]["keepEgressSeconds"], 5);
    assert_eq!(scenario.flows[0].rate_hz, 100);
    assert_eq!(scenario.flows[1].peer, Peer::Client);
    let Step::Migrate(migrate) = &scenario.steps[0] else {
        panic!("a migration");
    };
    let out = &migrate.expect.flows["out"];
    assert_eq!((out.tcp_survives, out.max_duplicated), (false, Some(0)));
}

#[test]
fn a_flow_that_cannot_be_is_refused() {
    for (from, to, needle) in [
        (
            "topology: routed",
            "topology: shared",
            "only with `topology: routed`",
        ),
        ("isolated: true", "isolated: false", "nothing forbids it"),
        ("name: out", "name: east-west", "names of their own"),
        ("name: shut,", "name: out,", "names of their own"),
        ("flows: {out", "flows: {shut", "shut"),
        ("flows: {out", "flows: {port", "heard_from"),
        ("through: node1", "through: node7", "node7"),
        (", through: node1", "", "cannot be reached from outside"),
        ("rate_hz: 500", "port: 1", "no port 1"),
        ("rate_hz: 500", "rate_hz: 0", "rate_hz"),
        (
            "opened_by: vm",
            "opened_by: vm, through: node1",
            "the outside opens",
        ),
    ] {
        let message = error(&ROUTED.replace(from, to));
        assert!(message.contains(needle), "{message}");
    }
}

#[test]
fn pods_ports_are_a_routed_networks_and_made_by_its_owner() {
    let routed = "about: One VM moves.\ntopology: routed\nports_of: pod";
    let text = GOOD.replace("about: One VM moves.", routed);
    let scenario = parse(Path::new("x.yaml"), &text).unwrap();
    assert_eq!(scenario.layout().ports_of, PortsOf::Pod);
    let shared = text.replace("topology: routed", "topology: shared");
    assert!(error(&shared).contains("ports_of: only with"));
    for other in ["requested_chassis: unset", "found_by: kube_ovn_name"] {
        let text = text.replace("node: node1", &format!("node: node1, {other}"));
        assert!(error(&text).contains("ports_of: pod"), "{other}");
    }
}

const WITH_AGENTS: &str = "\
name: one
about: One VM moves.
strategy: segue
hook: {deadline_seconds: 2, on_timeout: fail, failure_strategy: Fail}
vms:
  - {name: web, node: node1}
steps:
  - forge: {vm: web}
  - migrate:
      vm: web
      to: node2
      agents:
        - {node: node1, do: kill, at: armed}
        - {node: node2, do: absent, again_at: resumed}
      expect: {opened_by: announcement, forgeries: {on_source: 2}}
";

#[test]
fn agents_have_faults_and_they_end() {
    let scenario = parse(Path::new("x.yaml"), WITH_AGENTS).unwrap();
    let Step::Migrate(migrate) = &scenario.steps[1] else {
        panic!("a migration");
    };
    let [kill, absent] = migrate.agents.as_slice() else {
        panic!("two faults");
    };
    assert_eq!(
        (kill.at, kill.again_at),
        (Some(Moment::Armed), Moment::Ended)
    );
    assert_eq!((absent.at, absent.again_at), (None, Moment::Resumed));
    for (from, to, needle) in [
        (
            "strategy: segue",
            "strategy: segue-agentless",
            "only with `strategy: segue`",
        ),
        ("do: kill, at: armed", "do: kill", "at which moment"),
        ("do: absent,", "do: absent, at: armed,", "leave out at"),
        ("at: armed", "at: armed, again_at: created", "comes before"),
        ("node: node2, do", "node: node1, do", "one thing at a time"),
        ("node: node2, do", "node: node7, do", "node7"),
        ("forge: {vm: web}", "forge: {vm: wob}", "wob"),
    ] {
        let message = error(&WITH_AGENTS.replace(from, to));
        assert!(message.contains(needle), "{message}");
    }
}

#[test]
fn a_cnis_ports_are_named_as_it_names_them() {
    let cni = "name: one\ncni: kube-ovn\noptimize: false\n";
    let text = GOOD.replace("name: one\n", cni);
    let text = text.replace("to: node2", "to: node2, restart_cni_at: paused");
    let scenario = parse(Path::new("x.yaml"), &text).unwrap();
    assert_eq!(scenario.layout().cni, Some(Cni::KubeOvn));
    assert!(!scenario.optimize);
    let vm = &scenario.vms[0];
    assert_eq!(vm.found_by, FoundBy::KubeOvnName);
    assert_eq!(vm.requested_chassis, Requested::Unset);
    for (from, to, needle) in [
        (
            "cni: kube-ovn\noptimize: false\n",
            "",
            "no controller to restart",
        ),
        ("cni: kube-ovn\n", "", "leave out optimize"),
        ("cni: kube-ovn", "cni: calico", "calico"),
        (
            "cni: kube-ovn",
            "cni: kube-ovn\nstrategy: clone",
            "beside segue",
        ),
        (
            "cni: kube-ovn",
            "cni: kube-ovn\ntopology: routed",
            "topology: shared",
        ),
        (
            "node: node1",
            "node: node1, found_by: nothing",
            "leave them out",
        ),
    ] {
        let message = error(&text.replace(from, to));
        assert!(message.contains(needle), "{message}");
    }
}

#[test]
fn one_vm_moves_once_at_a_time() {
    let text = GOOD.replace(
        "migrate: {vm: web, to: node2}",
        "together: [{vm: web, to: node2}, {vm: web, to: node1}]",
    );
    assert!(error(&text).contains("twice at once"));
    let text = GOOD.replace(
        "migrate: {vm: web, to: node2}",
        "together: [{vm: web, to: node2, kill_controller: {at: armed}}]",
    );
    assert!(error(&text).contains("alone"));
}
