//! One observation at a time: how it starts, and how a decision changes it.

#![allow(clippy::expect_used, reason = "a test asserts by panicking")]
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeSet;

use handover::{
    Barrier, Binding, Chassis, Deadlines, Decision, Earlier, Epoch, FlipPolicy, Identity,
    MigrationUid, Newer, Observed, Outcome, Port, PortConfig, PortName, Signal, SignalKind,
    SignalSource, Signals, Since, Step, Timestamp, decide,
};

pub(crate) const START: Timestamp = Timestamp(1_000_000);

pub(crate) fn port(name: &str, requested: Option<&str>) -> Port {
    Port {
        name: PortName::new(name),
        config: PortConfig {
            requested_chassis: requested.map(str::to_owned),
            ..PortConfig::default()
        },
        binding: Binding {
            chassis: Some("n1".to_owned()),
            additional: Vec::new(),
        },
        activated: BTreeSet::new(),
        announces: true,
    }
}

pub(crate) fn observed(ports: Vec<Port>) -> Observed {
    Observed {
        now: START,
        identity: Identity {
            migration: MigrationUid::new("m"),
            epoch: Epoch(5),
        },
        newer: Newer::default(),
        earlier: Earlier::default(),
        is_named: false,
        outcome: Outcome::Running,
        source: Some(Chassis::new("n1", "n1.example")),
        target: Some(Chassis::new("n2", "n2.example")),
        former: Vec::new(),
        source_pod_gone: false,
        target_pod_gone: false,
        signals: Signals::default(),
        ports,
        barrier: Barrier {
            nb_cfg: 10,
            applied: [("n1", 10), ("n2", 10), ("n3", 10)]
                .map(|(name, applied)| (name.to_owned(), applied))
                .into(),
        },
        routes: Vec::new(),
        gateways: BTreeSet::new(),
        flip: FlipPolicy::default(),
        since: Since::default(),
        deadlines: Deadlines::default(),
    }
}

/// Puts the decision's write into effect.
pub(crate) fn apply(observed: &mut Observed, decision: &Decision) -> Step {
    let write = decision.write.as_ref().expect("a write was decided");
    for change in &write.ports {
        let port = observed
            .ports
            .iter_mut()
            .find(|port| port.name == change.port)
            .expect("the port of a write was observed");
        assert_eq!(change.check(&port.config), Ok(()));
        port.config = change.config.clone();
    }
    for change in &write.routes {
        let route = observed
            .routes
            .iter_mut()
            .find(|route| route.key == change.route)
            .expect("the route of a write was observed");
        assert_eq!(route.leads_to, change.from);
        route.leads_to = change.to.iter().cloned().collect();
    }
    if write.raise_nb_cfg_from.is_some() {
        observed.barrier.nb_cfg += 1;
    }
    write.step
}

pub(crate) fn armed(ports: Vec<Port>) -> Observed {
    let mut observed = observed(ports);
    let decision = decide(&observed);
    assert_eq!(apply(&mut observed, &decision), Step::Arm);
    observed
}

pub(crate) fn claim(observed: &mut Observed, port: usize) {
    observed.ports[port].binding.additional = vec!["n2".to_owned()];
}

pub(crate) fn at_barrier() -> Observed {
    let mut world = armed(vec![port("a", None)]);
    claim(&mut world, 0);
    let decision = decide(&world);
    apply(&mut world, &decision);
    world.since.barrier = Some(START);
    world
}

pub(crate) fn signal(kind: SignalKind, at: u64) -> Signal {
    Signal {
        kind,
        source: SignalSource::Activation,
        at: Timestamp(at),
    }
}
