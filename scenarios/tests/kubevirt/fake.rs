//! A hypervisor in memory. Copies wait until the test says how they end.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Instant,
};

use futures::{StreamExt as _, stream, stream::BoxStream};
use scenarios::kubevirt::{
    BoxError, DomainEvent, DomainState, Hypervisor, Machine, Migration, Nic, Sandbox,
};
use tempfile::TempDir;
use tokio::sync::{broadcast, watch};

/// How copies end from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copies {
    Wait,
    Succeed,
    Fail(&'static str),
}

#[derive(Clone)]
pub(crate) struct Fake(Arc<Inner>);

struct Inner {
    /// A directory for each node.
    nodes: TempDir,
    ports: Mutex<BTreeSet<(String, String)>>,
    domains: Mutex<BTreeMap<(String, String), DomainState>>,
    starts: Mutex<usize>,
    refused_preparations: Mutex<usize>,
    copies: watch::Sender<Copies>,
    aborted: watch::Sender<BTreeSet<String>>,
    events: broadcast::Sender<DomainEvent>,
}

impl Fake {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Inner {
            nodes: tempfile::tempdir().unwrap(),
            ports: Mutex::default(),
            domains: Mutex::default(),
            starts: Mutex::default(),
            refused_preparations: Mutex::default(),
            copies: watch::Sender::new(Copies::Wait),
            aborted: watch::Sender::default(),
            events: broadcast::Sender::new(64),
        }))
    }

    pub(crate) fn copies(&self, end: Copies) {
        self.0.copies.send_replace(end);
    }

    /// How many preparations of a target fail from now on.
    pub(crate) fn refuse_preparations(&self, count: usize) {
        *self.0.refused_preparations.lock().unwrap() = count;
    }

    /// The ports on each node, as `<node>/<iface-id>`.
    pub(crate) fn ports(&self) -> Vec<String> {
        self.0
            .ports
            .lock()
            .unwrap()
            .iter()
            .map(|(node, port)| format!("{node}/{port}"))
            .collect()
    }

    pub(crate) fn domain(&self, node: &str, domain: &str) -> Option<DomainState> {
        self.0
            .domains
            .lock()
            .unwrap()
            .get(&(node.into(), domain.into()))
            .copied()
    }

    /// How many copies were started, ever.
    pub(crate) fn copies_started(&self) -> usize {
        *self.0.starts.lock().unwrap()
    }

    fn set(&self, node: &str, domain: &str, state: DomainState) {
        let key = (node.to_owned(), domain.to_owned());
        if state == DomainState::Shutoff {
            if self.0.domains.lock().unwrap().remove(&key).is_none() {
                return;
            }
        } else {
            self.0.domains.lock().unwrap().insert(key, state);
        }
        // Nobody listens before the stand-in exists.
        let _ = self.0.events.send(DomainEvent {
            node: node.into(),
            domain: domain.into(),
            state,
            at: Instant::now(),
        });
    }
}

impl Hypervisor for Fake {
    async fn plug(&self, sandbox: &Sandbox, nics: &[Nic]) -> Result<(), BoxError> {
        for nic in nics {
            self.0
                .ports
                .lock()
                .unwrap()
                .insert((sandbox.node.clone(), nic.iface_id.clone()));
        }
        Ok(())
    }

    async fn unplug(&self, sandbox: &Sandbox, nics: &[Nic]) -> Result<(), BoxError> {
        for nic in nics {
            self.0
                .ports
                .lock()
                .unwrap()
                .remove(&(sandbox.node.clone(), nic.iface_id.clone()));
        }
        Ok(())
    }

    async fn start(&self, sandbox: &Sandbox, machine: &Machine) -> Result<(), BoxError> {
        self.set(&sandbox.node, &machine.domain(), DomainState::Running);
        Ok(())
    }

    async fn prepare_target(
        &self,
        _sandbox: &Sandbox,
        _machine: &Machine,
    ) -> Result<String, BoxError> {
        let mut refused = self.0.refused_preparations.lock().unwrap();
        if *refused > 0 {
            *refused -= 1;
            return Err("virtqemud is not there yet".into());
        }
        Ok("192.0.2.1".into())
    }

    async fn migrate(&self, migration: &Migration) -> Result<(), BoxError> {
        let (domain, source, target) = (
            migration.machine.domain(),
            &migration.source.node,
            &migration.target.node,
        );
        *self.0.starts.lock().unwrap() += 1;
        self.set(target, &domain, DomainState::Paused);
        let (mut copies, mut aborted) = (self.0.copies.subscribe(), self.0.aborted.subscribe());
        let end = tokio::select! {
            end = copies.wait_for(|copies| *copies != Copies::Wait) => *end?,
            _ = aborted.wait_for(|aborted| aborted.contains(&migration.uid)) => {
                Copies::Fail("operation aborted: migration out: canceled by client")
            }
        };
        if let Copies::Fail(reason) = end {
            self.set(target, &domain, DomainState::Shutoff);
            return Err(reason.into());
        }
        self.set(source, &domain, DomainState::Paused);
        self.set(target, &domain, DomainState::Running);
        self.set(source, &domain, DomainState::Shutoff);
        Ok(())
    }

    async fn abort(&self, migration: &Migration) -> Result<(), BoxError> {
        self.0.aborted.send_modify(|aborted| {
            aborted.insert(migration.uid.clone());
        });
        Ok(())
    }

    async fn destroy(&self, sandbox: &Sandbox, domain: &str) -> Result<(), BoxError> {
        self.set(&sandbox.node, domain, DomainState::Shutoff);
        Ok(())
    }

    fn on_node(&self, node: &str, path: &Path) -> PathBuf {
        let below = path.strip_prefix("/").unwrap_or(path);
        self.0.nodes.path().join(node).join(below)
    }

    fn events(&self) -> BoxStream<'static, DomainEvent> {
        stream::unfold(self.0.events.subscribe(), |mut events| async move {
            let event = events.recv().await.ok()?;
            Some((event, events))
        })
        .boxed()
    }
}
