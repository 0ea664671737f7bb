//! KubeVirt's stand-in asks; real libvirt, QEMU and Open vSwitch do.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result, anyhow};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use tokio::sync::{Notify, broadcast, mpsc};

use crate::kubevirt::{
    BoxError, DomainEvent, DomainState, Hypervisor, Machine, Migration, Nic as VmiNic, Sandbox,
};
use crate::lab::events::{Event, Follower, Kind, Lifecycle};
use crate::lab::libvirt::{MigrateOptions, MigrationJob, Outcome};
use crate::lab::routed::RoutedNetwork;
use crate::lab::topology::{SharedSwitch, Subnet};
use crate::lab::{Accel, Guest, GuestSpec, Host, Lab, Nic, events, guest, libvirt, topology};

const DEFAULT_MEMORY_MIB: u32 = 128;
/// Far more events than two migrations at once make while a reader is busy.
const EVENTS_KEPT: usize = 4_096;

/// The hypervisors of a lab. Cheap to clone.
#[derive(Clone)]
pub struct LabHypervisor(Arc<Inner>);

struct Inner {
    lab: Lab,
    /// Static `dataplane-probe`, run in every guest as reflector.
    probe: PathBuf,
    accel: Accel,
    state: std::sync::Mutex<State>,
    events: broadcast::Sender<Event>,
    /// Told when a pod has lost its taps.
    unplugged: Notify,
    _followers: Vec<Follower>,
}

#[derive(Default)]
struct State {
    /// What guests were made of, by domain.
    guests: HashMap<String, Guest>,
    /// Which pod, by UID, holds the taps of which ports on which node. Taps are named after their
    /// ports, so a pod that comes before its predecessor's network is torn down takes them over.
    plugged: HashMap<(String, String), String>,
    /// How the next migration of a domain is to go.
    plans: HashMap<String, MigrateOptions>,
    /// Migrations in progress, by UID: whom to ask to abort.
    running: HashMap<String, mpsc::Sender<()>>,
}

impl LabHypervisor {
    /// Follows the hypervisors of a lab that is up.
    pub async fn new(lab: &Lab, probe: PathBuf, accel: Accel) -> Result<Self> {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let mut followers = Vec::new();
        for node in lab.nodes() {
            followers.push(events::follow(node, sender.clone()).await?);
        }
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        tokio::spawn({
            let events = events.clone();
            async move {
                while let Some(event) = receiver.recv().await {
                    // Nobody listening is no error.
                    _ = events.send(event);
                }
            }
        });
        Ok(Self(Arc::new(Inner {
            lab: Lab::attach(lab.name())?,
            probe,
            accel,
            state: std::sync::Mutex::default(),
            events,
            unplugged: Notify::new(),
            _followers: followers,
        })))
    }

    /// Every event of every hypervisor from now on.
    pub fn raw_events(&self) -> broadcast::Receiver<Event> {
        self.0.events.subscribe()
    }

    /// Says how the next migration of a domain is to go.
    pub fn plan(&self, domain: &str, options: MigrateOptions) {
        self.state().plans.insert(domain.to_owned(), options);
    }

    /// Returns once no pod has the taps of these interfaces on a node.
    pub async fn unplugged(&self, node: &str, nics: &[Nic]) {
        let place = place_of(node, nics);
        loop {
            // Made before looking: what happens in between is not missed.
            let unplugged = self.0.unplugged.notified();
            if !self.state().plugged.contains_key(&place) {
                return;
            }
            unplugged.await;
        }
    }

    /// The guest behind a domain, once it was started somewhere.
    pub fn guest(&self, domain: &str) -> Option<Guest> {
        self.state().guests.get(domain).cloned()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic elsewhere leaves at worst an entry too many.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node(&self, name: &str) -> Result<&Host> {
        self.0.lab.host(name)
    }

    /// Makes the guest of a machine anew: another VM of the same name may have been there before.
    fn make_guest(&self, machine: &Machine) -> Result<Guest> {
        let domain = machine.domain();
        let nics = lab_nics(&machine.nics)?;
        let spec = GuestSpec {
            memory_mib: memory_mib(machine)?,
            accel: self.0.accel,
            probe: Some(self.0.probe.clone()),
            ..GuestSpec::new(&domain, nics)
        };
        let guest = Guest::prepare(&self.0.lab, spec)?;
        self.state().guests.insert(domain, guest.clone());
        Ok(guest)
    }

    /// Plugs a card as its port; there is a tap already where another pod of the VM has one on the node.
    async fn plug_card(
        &self,
        sandbox: &Sandbox,
        card: &VmiNic,
        nic: &Nic,
        is_there: bool,
    ) -> Result<()> {
        let node = self.node(&sandbox.node)?;
        let lsp = if card.of_pod {
            sandbox.port()
        } else {
            nic.lsp.clone()
        };
        if card.of_pod {
            let (node, vm) = (sandbox.node.as_str(), card.vm.as_deref());
            if let Some(switch) = self.shared_switch(nic) {
                switch.add_pod_port(nic, node, &lsp, vm).await?;
            } else {
                let network = RoutedNetwork::attach(&self.0.lab);
                network.add_pod_port(nic, node, &lsp, vm).await?;
            }
        }
        if is_there {
            node.ovs().add_port(&nic.tap(), &lsp).await
        } else {
            guest::plug_as(node, nic, &lsp).await
        }
    }

    /// The shared switch that an interface is on, by its address; none on the routed network.
    fn shared_switch(&self, nic: &Nic) -> Option<SharedSwitch<'_>> {
        let subnet = Subnet::of(nic)?;
        Some(SharedSwitch::attach(&self.0.lab, subnet))
    }

    async fn copy(&self, migration: &Migration) -> Result<()> {
        let domain = migration.machine.domain();
        let options = self.state().plans.remove(&domain).unwrap_or_default();
        let (source, target) = (
            self.node(&migration.source.node)?,
            self.node(&migration.target.node)?,
        );
        let (ask, mut asked) = mpsc::channel(1);
        let job = libvirt::migrate(source, target, &domain, options).await?;
        self.state().running.insert(migration.uid.clone(), ask);
        let outcome = wait_or_abort(job, &mut asked).await;
        self.state().running.remove(&migration.uid);
        match outcome? {
            Outcome::Completed => Ok(()),
            Outcome::Failed(why) => Err(anyhow!("{why}")),
        }
    }
}

/// Waits for a migration, and aborts it when asked to.
async fn wait_or_abort(job: MigrationJob, asked: &mut mpsc::Receiver<()>) -> Result<Outcome> {
    let aborter = job.aborter();
    let mut waiting = std::pin::pin!(job.wait());
    tokio::select! {
        outcome = &mut waiting => return outcome,
        Some(()) = asked.recv() => aborter.abort().await?,
    }
    waiting.await
}

/// A node, and the taps that a pod has there.
fn place_of(node: &str, nics: &[Nic]) -> (String, String) {
    let taps: Vec<_> = nics.iter().map(Nic::tap).collect();
    (node.to_owned(), taps.join(" "))
}

fn lab_nics(nics: &[VmiNic]) -> Result<Vec<Nic>> {
    nics.iter().map(lab_nic).collect()
}

/// A card as the lab makes it. The lab's addresses tell which of its networks a card is on.
fn lab_nic(nic: &VmiNic) -> Result<Nic> {
    let mac = nic
        .mac
        .parse()
        .with_context(|| format!("macAddress of interface {}", nic.name))?;
    Ok(topology::guest_nic(&nic.iface_id, mac, &nic.addresses))
}

/// `spec.domain.memory.guest`, where it is a whole number of mebibytes as the runner writes it.
fn memory_mib(machine: &Machine) -> Result<u32> {
    let memory = machine.vmi.spec.domain.unknown.get("memory");
    let Some(guest) = memory.and_then(|memory| memory.get("guest")?.as_str()) else {
        return Ok(DEFAULT_MEMORY_MIB);
    };
    guest
        .strip_suffix("Mi")
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("spec.domain.memory.guest {guest:?}: write it as 128Mi"))
}

/// What the stand-in for virt-handler makes of an event.
fn domain_event(event: &Event) -> Option<DomainEvent> {
    let Kind::Lifecycle(lifecycle) = event.kind else {
        return None;
    };
    let state = match lifecycle {
        Lifecycle::Started { migrated: false } | Lifecycle::Resumed { .. } => DomainState::Running,
        Lifecycle::Started { migrated: true } | Lifecycle::Suspended { .. } => DomainState::Paused,
        Lifecycle::Stopped { .. } => DomainState::Shutoff,
        Lifecycle::Other(..) => return None,
    };
    let ago = SystemTime::now()
        .duration_since(event.at)
        .unwrap_or_default();
    Some(DomainEvent {
        node: event.host.clone(),
        domain: event.domain.clone(),
        state,
        at: Instant::now().checked_sub(ago).unwrap_or_else(Instant::now),
    })
}

impl Hypervisor for LabHypervisor {
    async fn plug(&self, sandbox: &Sandbox, cards: &[VmiNic]) -> Result<(), BoxError> {
        let nics = lab_nics(cards)?;
        let place = place_of(&sandbox.node, &nics);
        let holder = self.state().plugged.get(&place).cloned();
        tracing::debug!(?place, pod = sandbox.pod, ?holder, "plugging");
        for (card, nic) in cards.iter().zip(&nics) {
            self.plug_card(sandbox, card, nic, holder.is_some()).await?;
        }
        self.state().plugged.insert(place, sandbox.uid.clone());
        Ok(())
    }

    async fn unplug(&self, sandbox: &Sandbox, cards: &[VmiNic]) -> Result<(), BoxError> {
        let nics = lab_nics(cards)?;
        let place = place_of(&sandbox.node, &nics);
        let holder = self.state().plugged.get(&place).cloned();
        tracing::debug!(?place, pod = sandbox.pod, ?holder, "unplugging");
        if holder.as_ref() == Some(&sandbox.uid) {
            guest::unplug(self.node(&sandbox.node)?, &nics).await?;
            self.state().plugged.remove(&place);
            self.0.unplugged.notify_waiters();
        }
        for (_, nic) in cards.iter().zip(&nics).filter(|(card, _)| card.of_pod) {
            let port = sandbox.port();
            if let Some(switch) = self.shared_switch(nic) {
                switch.del_pod_port(&port).await?;
            } else {
                let network = RoutedNetwork::attach(&self.0.lab);
                network.del_pod_port(&port).await?;
            }
        }
        Ok(())
    }

    async fn start(&self, sandbox: &Sandbox, machine: &Machine) -> Result<(), BoxError> {
        let guest = self.make_guest(machine)?;
        let node = self.node(&sandbox.node)?;
        if guest.runs_on(node).await? {
            return Ok(());
        }
        Ok(guest.boot(node).await?)
    }

    async fn prepare_target(
        &self,
        sandbox: &Sandbox,
        _machine: &Machine,
    ) -> Result<String, BoxError> {
        let node = self.node(&sandbox.node)?;
        let address = node
            .management()
            .with_context(|| format!("{} has no address for migrations", node.name()))?;
        Ok(address.to_string())
    }

    async fn migrate(&self, migration: &Migration) -> Result<(), BoxError> {
        Ok(self.copy(migration).await?)
    }

    async fn abort(&self, migration: &Migration) -> Result<(), BoxError> {
        let running = self.state().running.get(&migration.uid).cloned();
        let asked = running.with_context(|| format!("migration {} does not run", migration.uid))?;
        Ok(asked.send(()).await?)
    }

    async fn destroy(&self, sandbox: &Sandbox, domain: &str) -> Result<(), BoxError> {
        let Some(guest) = self.guest(domain) else {
            return Ok(());
        };
        let node = self.node(&sandbox.node)?;
        if node.libvirt().qemu(domain)?.is_none() {
            return Ok(());
        }
        tracing::debug!(domain, node = node.name(), "destroying");
        node.libvirt().virsh(["destroy", guest.name()]).await?;
        Ok(())
    }

    fn on_node(&self, node: &str, path: &Path) -> PathBuf {
        // Nobody asks for a node that there is not: they are the lab's.
        let node = self.node(node);
        node.map_or_else(|_| path.to_owned(), |node| node.path_of(path))
    }

    fn events(&self) -> BoxStream<'static, DomainEvent> {
        let receiver = self.raw_events();
        futures::stream::unfold(receiver, |mut receiver| async move {
            loop {
                match receiver.recv().await {
                    Ok(event) => return Some((event, receiver)),
                    // What was missed is deduced from the calls.
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        })
        .filter_map(|event| async move { domain_event(&event) })
        .boxed()
    }
}
