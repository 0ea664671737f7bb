//! Whole handovers of pairs: the decisions, written by the real writer to a real server, by
//! controllers that stop between any two writes.

use handover::{
    Barrier, Chassis, Decision, Epoch, Identity, Mark, MigrationUid, Observed, Outcome, Port, Side,
    Signal, SignalKind, SignalSource, Signals, Timestamp, decide,
};

use super::statics::{AFTER, BEFORE, lab, target};
use super::*;
use crate::ovn::{Basis, read_config, shown};

/// What a handover is about, and how far it is.
#[derive(Clone, Copy)]
struct Move {
    epoch: u64,
    from: &'static str,
    to: &'static str,
    resumed: bool,
    outcome: Outcome,
}

const FIRST: Move = Move {
    epoch: 1,
    from: "c1",
    to: "c2",
    resumed: false,
    outcome: Outcome::Running,
};

impl Move {
    fn resumed(self) -> Self {
        Self {
            resumed: true,
            ..self
        }
    }

    fn over(self, side: Side) -> Self {
        Self {
            outcome: Outcome::GuestOn(side),
            ..self
        }
    }

    /// The chassis that have a pod of the guest's.
    fn pods(&self) -> Vec<&'static str> {
        match self.outcome {
            Outcome::GuestOn(Side::Source) => vec![self.from],
            Outcome::GuestOn(Side::Target) => vec![self.to],
            _ => vec![self.from, self.to],
        }
    }

    fn observed(&self, view: &View) -> Observed {
        let mut rows = view.ports.clone();
        for row in &mut rows {
            let switch = view.switch_of(&row.uuid);
            let mut pods = self.pods().into_iter();
            let here = pods.find(|pod| view.statics.switch_for(pod) == switch);
            row.binding.chassis = here.map(str::to_owned);
        }
        let opened = self.resumed.then(|| self.to.to_owned());
        let opened: BTreeSet<_> = opened.into_iter().collect();
        let ports = shown(&rows).into_iter().map(|row| Port {
            name: row.name.clone(),
            config: read_config(&row).unwrap(),
            binding: row.binding,
            activated: opened.clone(),
            announces: true,
        });
        let mut signals = Signals::default();
        if self.resumed {
            signals.note(Signal {
                kind: SignalKind::ResumedOnTarget,
                source: SignalSource::DomainReady,
                at: Timestamp(1),
            });
        }
        let nb_cfg = view.nb_global.unwrap().1;
        Observed {
            now: Timestamp(2),
            identity: Identity {
                migration: MigrationUid::new(format!("m-{}", self.epoch)),
                epoch: Epoch(self.epoch),
            },
            newer: handover::Newer::default(),
            earlier: handover::Earlier::default(),
            is_named: true,
            outcome: self.outcome,
            source: Some(Chassis::new(self.from, "")),
            target: Some(Chassis::new(self.to, "")),
            former: Vec::new(),
            source_pod_gone: !self.pods().contains(&self.from),
            target_pod_gone: !self.pods().contains(&self.to),
            signals,
            ports: ports.collect(),
            routes: view.statics.routes.clone(),
            gateways: view.statics.gateways.clone(),
            flip: handover::FlipPolicy::default(),
            barrier: Barrier {
                nb_cfg,
                applied: ["c1", "c2", "c3"].map(|c| (c.to_owned(), nb_cfg)).into(),
            },
            since: handover::Since::default(),
            deadlines: handover::Deadlines::default(),
        }
    }
}

impl Lab {
    /// Makes at most `limit` writes, each by a controller that knows of no other. Says how many.
    async fn run(&mut self, step: Move, limit: usize) -> usize {
        for made in 0..limit {
            let view = self.view("w0");
            let decision = decide(&step.observed(&view));
            if decision.write.is_none() {
                return made;
            }
            self.carry_out(step, &view, &decision).await;
            self.restart().await;
            self.reachable();
        }
        limit
    }

    /// The same until nothing is left to write.
    async fn finish(&mut self, step: Move) -> usize {
        let made = self.run(step, 12).await;
        assert!(made < 12, "the writes do not end");
        made
    }

    async fn carry_out(&self, step: Move, view: &View, decision: &Decision) {
        let write = decision.write.as_ref().unwrap();
        let mark = Mark {
            migration: MigrationUid::new(""),
            epoch: Epoch(step.epoch),
            source: step.from.into(),
            target: step.to.into(),
            original: handover::Original::default(),
            barrier: None,
            source_released: false,
        };
        let target = target(view, &mark);
        let basis = Basis {
            view,
            static_routes: true,
            target: Some(&target),
        };
        let written = soon(self.writer.write(write, basis, "test")).await;
        assert_eq!(written, Written::Committed, "{write:?}");
    }

    async fn restart(&mut self) {
        self.writer.stop().await;
        let databases = Databases::start(&self.other, &self.southbound, Some("cluster"));
        self.databases = Arc::new(databases.unwrap());
        for (_, replica) in self.databases.replicas() {
            soon(replica.wait_synced()).await.unwrap();
        }
        self.writer = Arc::new(soon(Writer::start(self.other.clone())).await.unwrap());
    }

    /// The route leads to a switch that has a port of the guest's.
    fn reachable(&self) {
        let port = self.output_port().unwrap();
        let switch = port.strip_prefix("cluster-").unwrap();
        assert!(
            !self.on_switch(switch).is_empty(),
            "nobody is behind {port}"
        );
    }

    /// The port is on one switch alone, as it was, and the route leads there.
    async fn rests_on(&self, chassis: &str, name: &str) {
        for other in ["c1", "c2", "c3"] {
            let expected = if other == chassis { vec![name] } else { vec![] };
            assert_eq!(self.on_switch(&format!("sw-{other}")), expected, "{other}");
        }
        let port = self.port(name).unwrap().1;
        let ids: Vec<_> = port.external_ids.keys().map(String::as_str).collect();
        assert_eq!(ids, ["foreign", "segue.io/vm"]);
        assert!(!port.options.contains_key("requested-chassis"), "{port:?}");
        assert!(
            !port.options.contains_key("activation-strategy"),
            "{port:?}"
        );
        assert_eq!(self.output_port(), Some(format!("cluster-sw-{chassis}")));
        assert_eq!(self.group().await, texts(&[name]));
    }

    async fn succeed(&mut self, step: Move) {
        self.finish(step).await;
        self.finish(step.resumed()).await;
        self.finish(step.resumed().over(Side::Target)).await;
    }
}

const THIRD: &str = "tenant_virt-launcher-w0-c";

#[tokio::test]
async fn a_pair_goes_all_the_way_and_back() {
    let mut lab = lab(&[]).await;
    lab.succeed(FIRST).await;
    lab.rests_on("c2", AFTER).await;

    let mut back = self::lab(&[]).await;
    back.finish(FIRST).await;
    back.finish(FIRST.resumed()).await;
    back.finish(FIRST.over(Side::Source)).await;
    back.rests_on("c1", BEFORE).await;
}

#[tokio::test]
async fn a_target_that_moves_on_is_followed_from_any_write() {
    let moved = Move { to: "c3", ..FIRST };
    for writes in 1..=2 {
        let mut lab = lab(&[]).await;
        assert_eq!(lab.run(FIRST, writes).await, writes);
        lab.finish(moved).await;
        assert!(lab.on_switch("sw-c2").is_empty(), "after {writes}");
        assert_eq!(lab.on_switch("sw-c3"), [THIRD]);
        lab.succeed(moved).await;
        lab.rests_on("c3", THIRD).await;
    }
}

#[tokio::test]
async fn a_migration_takes_over_the_pair_of_one_that_failed_unseen() {
    let next = Move {
        epoch: 2,
        to: "c3",
        ..FIRST
    };
    for writes in 1..=2 {
        let mut lab = lab(&[]).await;
        assert_eq!(lab.run(FIRST, writes).await, writes);
        lab.succeed(next).await;
        lab.rests_on("c3", THIRD).await;
    }
}

#[tokio::test]
async fn a_migration_takes_over_the_pair_of_one_that_succeeded_unseen() {
    let next = Move {
        epoch: 2,
        from: "c2",
        to: "c3",
        ..FIRST
    };
    for writes in 0..=2 {
        let mut lab = lab(&[]).await;
        lab.finish(FIRST).await;
        lab.finish(FIRST.resumed()).await;
        lab.run(FIRST.resumed().over(Side::Target), writes).await;
        lab.succeed(next).await;
        lab.rests_on("c3", THIRD).await;
    }
}
