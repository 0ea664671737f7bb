//! The peers' sequences against a real server with OVN's real schema: what is written on which sign, and nothing else.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ovsdb_rs::{
    Client, ClientOptions, Condition, Datum, Endpoint, Mutation, Replica, Row, Transaction,
};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::super::*;
use crate::kubevirt::VmimPhase;
use crate::lab::routed::PORT_KEY;

const DATABASE: &str = "OVN_Northbound";
const ADDRESSES: &str = "0a:58:0a:80:00:0a 10.128.0.10 fd00:10:128::a";

ovsdb_rs::table! {
    #[derive(Eq)]
    struct Lsp in "Logical_Switch_Port" {
        name: String,
        options: BTreeMap<String, String>,
        addresses: Vec<String>,
        port_security: Vec<String>,
        enabled: Option<bool>,
        external_ids: BTreeMap<String, String>,
    }

    #[derive(Eq)]
    struct Switch in "Logical_Switch" {
        name: String,
        ports: std::collections::BTreeSet<uuid::Uuid>,
    }

    #[derive(Eq)]
    struct Group in "Port_Group" {
        ports: std::collections::BTreeSet<uuid::Uuid>,
    }

    #[derive(Eq)]
    struct Route in "Logical_Router_Static_Route" {
        ip_prefix: String,
        output_port: Option<String>,
    }
}

/// A running server; killed when dropped.
struct Server {
    directory: TempDir,
    child: Child,
}

/// A Northbound with a VM's port, and a replay under way.
struct World {
    client: Client,
    replica: Replica,
    seen: watch::Sender<Seen>,
    moments: Moments,
    replaying: JoinHandle<Result<(), Error>>,
    _server: Server,
}

/// What a port requests: chassis and activation strategy.
type Requests = (Option<String>, Option<String>);

fn requests(chassis: &str, strategy: Option<&str>) -> Requests {
    (Some(chassis.to_owned()), strategy.map(str::to_owned))
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("db");
        let created = Command::new(found("ovsdb-tool", "SEGUE_OVS_BIN", "", "/usr/bin"))
            .arg("create")
            .arg(&database)
            .arg(found(
                "ovn-nb.ovsschema",
                "SEGUE_OVN_SCHEMAS",
                "schemas",
                "/usr/share/ovn",
            ))
            .status()
            .unwrap();
        assert!(created.success(), "ovsdb-tool: {created}");
        let at = |name: &str| directory.path().join(name).display().to_string();
        let child = Command::new(found("ovsdb-server", "SEGUE_OVS_BIN", "", "/usr/sbin"))
            .args(["-vconsole:off", "-vfile:off", "--no-chdir"])
            .arg(format!("--remote=punix:{}", at("sock")))
            .arg(format!("--unixctl={}", at("ctl")))
            .arg(database)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { directory, child }
    }

    async fn connect(&self) -> Client {
        let options = ClientOptions {
            min_backoff: Duration::from_millis(5),
            max_backoff: Duration::from_millis(50),
            ..ClientOptions::default()
        };
        let socket = Endpoint::Unix(self.directory.path().join("sock"));
        soon(Client::connect(socket, options)).await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only where it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program or schema where `make tools` puts it, where the variable says, or where a package has it.
fn found(name: &str, variable: &str, below: &str, installed: &str) -> PathBuf {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")));
    let cached = cache.map(|cache| cache.join("segue/image-bin").join(below));
    let places: Vec<PathBuf> = match set(variable) {
        Some(directory) => vec![directory.into()],
        None => cached
            .into_iter()
            .chain([PathBuf::from(installed)])
            .collect(),
    };
    let mut paths = places.iter().map(|place: &PathBuf| Path::join(place, name));
    let path = paths.find(|path| path.is_file());
    path.unwrap_or_else(|| {
        panic!("{name} is not in {places:?}: run `make tools`, or set {variable}")
    })
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("it takes too long")
}

impl World {
    /// A VM on node1 that is to go to node2, and a strategy that hands it over.
    async fn start(strategy: Strategy, topology: Topology) -> Self {
        let server = Server::start();
        let client = server.connect().await;
        lay_out(&client, strategy == Strategy::OvnKubernetes, topology).await;
        let replica = Replica::builder(DATABASE)
            .table::<Lsp>()
            .table::<Switch>()
            .table::<Group>()
            .table::<Route>()
            .start(&client)
            .unwrap();
        soon(replica.wait_synced()).await.unwrap();
        let (seen, signs) = watch::channel(Seen::default());
        let moments = Moments::new();
        let stage = Stage {
            north: Northbound::over(server.connect().await),
            ports: vec!["web".to_owned()],
            source: "node1".to_owned(),
            target: "node2".to_owned(),
            topology,
            moments: moments.clone(),
        };
        let replaying = tokio::spawn(async move {
            let baseline = baseline(strategy).unwrap();
            baseline.replay(&stage, Signs::new(signs)).await
        });
        Self {
            client,
            replica,
            seen,
            moments,
            replaying,
            _server: server,
        }
    }

    /// Shows a sign.
    fn show(&self, sign: impl FnOnce(&mut Seen)) {
        self.seen.send_modify(sign);
    }

    fn phase(&self, phase: VmimPhase) {
        self.show(|seen| seen.phase = Some(phase));
    }

    fn target_pod(&self) {
        self.show(|seen| seen.target_pod = Some("virt-launcher-web-b".to_owned()));
    }

    fn lsp(&self, name: &str) -> Option<Lsp> {
        let rows = self.replica.rows::<Lsp>();
        let found = rows.into_iter().find(|(_, row)| row.name == name);
        found.map(|(_, row)| Lsp::clone(&row))
    }

    fn requests(&self) -> Requests {
        let options = self.lsp("web").unwrap().options;
        // Somebody else's key is nobody's business.
        assert_eq!(options["vif-plug-mtu"], "1400");
        let of = |key: &str| options.get(key).cloned();
        (of("requested-chassis"), of("activation-strategy"))
    }

    /// Waits until the replica shows it.
    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let mut changed = self.replica.changed();
        let waiting = async {
            while !holds(self) {
                changed.changed().await.unwrap();
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(20), waiting).await;
        assert!(waited.is_ok(), "{what}: {:?}", self.replica.rows::<Lsp>());
    }

    /// Waits until the port requests this.
    async fn until_requests(&self, wanted: Requests) {
        let what = format!("the port requests {wanted:?}");
        self.until(&what, |world| world.requests() == wanted).await;
    }

    /// Gives whoever replays the time that a transaction takes there and back, twice: what it had to write by now it has
    /// written, and the replica has it.
    async fn let_it_act(&self) {
        for _ in 0..2 {
            let mut tx = Transaction::new();
            tx.mutate(
                "Logical_Switch_Port",
                Condition::eq("name", "bystander"),
                Mutation::put("external_ids", "seen", "yes"),
            );
            soon(self.client.transact(DATABASE, tx)).await.unwrap();
        }
    }

    async fn ends(self) -> Result<(), Error> {
        soon(self.replaying).await.unwrap()
    }
}

/// A port of a VM, or the port and the routes of its pod; switches, a port group, and somebody else's port.
async fn lay_out(client: &Client, of_pod: bool, topology: Topology) {
    let mut tx = Transaction::new();
    let name = if of_pod {
        "demo_virt-launcher-web-a"
    } else {
        "web"
    };
    let row = Row::new()
        .set("name", name)
        .set("addresses", ADDRESSES)
        .set("port_security", ADDRESSES)
        .set(
            "options",
            Datum::map([("requested-chassis", "node1"), ("vif-plug-mtu", "1400")]),
        )
        .set("external_ids", Datum::map([(PORT_KEY, "web")]));
    let port = tx.insert("Logical_Switch_Port", row);
    let bystander = Row::new()
        .set("name", "bystander")
        .set("options", Datum::map([("requested-chassis", "node3")]));
    let bystander = tx.insert("Logical_Switch_Port", bystander);
    let born_on = match topology {
        Topology::Shared => "shared0",
        Topology::Routed => "node1",
    };
    for switch in ["shared0", "node1", "node2"] {
        let row = Row::new().set("name", switch);
        let ports = [port.reference(), bystander.reference()];
        let row = if switch == born_on {
            row.set("ports", Datum::set(ports))
        } else {
            row
        };
        tx.insert("Logical_Switch", row);
    }
    let group = Row::new()
        .set("name", "isolated")
        .set("ports", Datum::set([port.reference()]));
    tx.insert("Port_Group", group);
    let routes = ["10.128.0.10/32", "fd00:10:128::a/128"].map(|prefix| {
        let route = Row::new()
            .set("ip_prefix", prefix)
            .set("nexthop", prefix.split('/').next().unwrap_or_default())
            .set("output_port", "cluster-node1")
            .set("external_ids", Datum::map([(PORT_KEY, "web")]));
        tx.insert("Logical_Router_Static_Route", route).reference()
    });
    let cluster = Row::new()
        .set("name", "cluster")
        .set("static_routes", Datum::set(routes));
    tx.insert("Logical_Router", cluster);
    soon(client.transact(DATABASE, tx)).await.unwrap();
}

#[tokio::test]
async fn kube_ovn_writes_at_scheduling_and_when_it_is_over() {
    let world = World::start(Strategy::KubeOvn, Topology::Shared).await;
    let before = requests("node1", None);
    world.phase(VmimPhase::Scheduling);
    world.let_it_act().await;
    assert_eq!(world.requests(), before, "the target has no node yet");
    world.target_pod();
    let both = requests("node1,node2", Some("rarp"));
    world.until_requests(both.clone()).await;
    world.phase(VmimPhase::Running);
    world.show(|seen| {
        (seen.resumed, seen.target_ready, seen.left) = (true, true, true);
    });
    world.let_it_act().await;
    assert_eq!(world.requests(), both, "the guest moves, the port does not");
    world.phase(VmimPhase::Succeeded);
    world.until_requests(requests("node2", None)).await;
    assert_eq!(
        world.lsp("bystander").unwrap().options["requested-chassis"],
        "node3"
    );
    world.ends().await.unwrap();
}

#[tokio::test]
async fn kube_ovn_gives_a_failed_migration_back_to_the_source() {
    let world = World::start(Strategy::KubeOvn, Topology::Routed).await;
    world.phase(VmimPhase::Scheduled);
    world.target_pod();
    world
        .until_requests(requests("node1,node2", Some("rarp")))
        .await;
    world.phase(VmimPhase::Failed);
    world.until_requests(requests("node1", None)).await;
    world.ends().await.unwrap();
}

#[tokio::test]
async fn neutron_writes_at_the_binding_and_when_the_hypervisor_is_done() {
    let world = World::start(Strategy::Neutron, Topology::Shared).await;
    world.target_pod();
    let both = requests("node1,node2", Some("rarp"));
    world.until_requests(both.clone()).await;
    world.show(|seen| seen.resumed = true);
    world.let_it_act().await;
    assert_eq!(world.requests(), both);
    world.show(|seen| seen.left = true);
    world.until_requests(requests("node2", None)).await;
    world.ends().await.unwrap();
}

#[tokio::test]
async fn neutron_gives_a_failed_migration_back_to_the_source() {
    let world = World::start(Strategy::Neutron, Topology::Shared).await;
    world.target_pod();
    world
        .until_requests(requests("node1,node2", Some("rarp")))
        .await;
    world.phase(VmimPhase::Failed);
    world.until_requests(requests("node1", None)).await;
    world.ends().await.unwrap();
}

#[tokio::test]
async fn clones_have_no_strategy() {
    let world = World::start(Strategy::Clone, Topology::Shared).await;
    world.target_pod();
    world.until_requests(requests("node1,node2", None)).await;
    world.phase(VmimPhase::Succeeded);
    world.until_requests(requests("node2", None)).await;
    world.ends().await.unwrap();
}

#[tokio::test]
async fn a_single_chassis_changes_at_the_resume() {
    let world = World::start(Strategy::Single, Topology::Shared).await;
    world.target_pod();
    world.phase(VmimPhase::Running);
    world.let_it_act().await;
    assert_eq!(world.requests(), requests("node1", None));
    assert_eq!(world.moments.at(Moment::Flipped), None);
    world.show(|seen| seen.resumed = true);
    world.until_requests(requests("node2", None)).await;
    soon(world.moments.wait(Moment::Flipped)).await;
    world.phase(VmimPhase::Succeeded);
    world.ends().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_resumes_where_it_was_keeps_its_single_chassis() {
    let world = World::start(Strategy::Single, Topology::Shared).await;
    world.target_pod();
    world.phase(VmimPhase::Failed);
    world.until_requests(requests("node1", None)).await;
    assert_eq!(world.moments.at(Moment::Flipped), None);
    world.ends().await.unwrap();
}

const SOURCE: &str = "demo_virt-launcher-web-a";
const TARGET: &str = "demo_virt-launcher-web-b";

impl World {
    /// Whether a pod's port is open, and has the VM's addresses.
    fn is_open(&self, name: &str) -> bool {
        self.lsp(name).is_some_and(|port| {
            let open = port.enabled != Some(false);
            assert_eq!(open, port.addresses == [ADDRESSES], "{port:?}");
            open
        })
    }

    fn switch_of(&self, name: &str) -> Option<String> {
        let rows = self.replica.rows::<Lsp>();
        let (port, _) = rows.into_iter().find(|(_, row)| row.name == name)?;
        let switches = self.replica.rows::<Switch>();
        let mut on = switches
            .into_iter()
            .filter(|(_, row)| row.ports.contains(&port));
        on.next().map(|(_, row)| row.name.clone())
    }

    fn routes_lead_to(&self, output_port: &str) -> bool {
        let routes = self.replica.rows::<Route>();
        let leads = |route: &Route| route.output_port.as_deref() == Some(output_port);
        routes.len() == 2 && routes.iter().all(|(_, route)| leads(route))
    }

    /// The target's port is one like the source's, in its port group, and asks for its own chassis alone.
    fn assert_alike(&self) {
        let (source, target) = (self.lsp(SOURCE).unwrap(), self.lsp(TARGET).unwrap());
        assert_eq!(target.port_security, source.port_security);
        assert_eq!(target.external_ids, source.external_ids);
        let requested = BTreeMap::from([("requested-chassis".to_owned(), "node2".to_owned())]);
        assert_eq!(target.options, requested);
        let groups = self.replica.rows::<Group>();
        assert_eq!(groups[0].1.ports.len(), 2);
    }
}

#[tokio::test]
async fn ovn_kubernetes_swaps_the_ports_of_a_shared_switch_when_the_target_is_ready() {
    let world = World::start(Strategy::OvnKubernetes, Topology::Shared).await;
    world.target_pod();
    world
        .until("the target's port is there", |world| {
            world.lsp(TARGET).is_some()
        })
        .await;
    world.assert_alike();
    assert_eq!(world.switch_of(TARGET).as_deref(), Some("shared0"));
    assert!(world.is_open(SOURCE) && !world.is_open(TARGET));
    world.show(|seen| seen.resumed = true);
    world.let_it_act().await;
    assert!(!world.is_open(TARGET), "the resume is not its sign");
    world.show(|seen| seen.target_ready = true);
    world
        .until("the target's port is open", |world| world.is_open(TARGET))
        .await;
    assert!(!world.is_open(SOURCE), "in one transaction");
    soon(world.moments.wait(Moment::Flipped)).await;
    world.phase(VmimPhase::Succeeded);
    world.ends().await.unwrap();
}

#[tokio::test]
async fn ovn_kubernetes_leads_the_routes_to_the_target_when_it_is_ready() {
    let world = World::start(Strategy::OvnKubernetes, Topology::Routed).await;
    world.target_pod();
    world
        .until("the target's port is there", |world| {
            world.lsp(TARGET).is_some()
        })
        .await;
    world.assert_alike();
    assert_eq!(world.switch_of(TARGET).as_deref(), Some("node2"));
    assert!(world.is_open(SOURCE) && world.is_open(TARGET));
    assert!(world.routes_lead_to("cluster-node1"));
    world.show(|seen| seen.target_ready = true);
    world
        .until("the routes lead to node2", |world| {
            world.routes_lead_to("cluster-node2")
        })
        .await;
    world.phase(VmimPhase::Succeeded);
    world.ends().await.unwrap();
}

#[tokio::test]
async fn ovn_kubernetes_goes_back_from_a_target_that_was_ready_and_failed() {
    for topology in [Topology::Shared, Topology::Routed] {
        let world = World::start(Strategy::OvnKubernetes, topology).await;
        world.target_pod();
        world.show(|seen| seen.target_ready = true);
        soon(world.moments.wait(Moment::Flipped)).await;
        world.phase(VmimPhase::Failed);
        match topology {
            Topology::Shared => {
                let open = |world: &World| world.is_open(SOURCE) && !world.is_open(TARGET);
                world.until("the source's port is open", open).await;
            }
            Topology::Routed => {
                let back = |world: &World| world.routes_lead_to("cluster-node1");
                world.until("the routes lead back", back).await;
            }
        }
        world.ends().await.unwrap();
    }
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    let world = World::start(Strategy::Clone, Topology::Shared).await;
    let mut tx = Transaction::new();
    let rows = Condition::includes("external_ids", Datum::map([(PORT_KEY, "web")]));
    tx.update(
        "Logical_Switch_Port",
        rows,
        Row::new().set("name", "renamed"),
    );
    soon(world.client.transact(DATABASE, tx)).await.unwrap();
    world.target_pod();
    let error = world.ends().await.unwrap_err();
    assert!(
        matches!(&error, Error::NoPort(port) if port == "web"),
        "{error}"
    );

    let world = World::start(Strategy::OvnKubernetes, Topology::Shared).await;
    let mut tx = Transaction::new();
    let rows = Condition::eq("name", SOURCE);
    let nobodys = Mutation::delete_keys("external_ids", [PORT_KEY]);
    tx.mutate("Logical_Switch_Port", rows, [nobodys]);
    soon(world.client.transact(DATABASE, tx)).await.unwrap();
    world.target_pod();
    let error = world.ends().await.unwrap_err().to_string();
    assert!(
        error.starts_with("0 logical switch ports of pods are web"),
        "{error}"
    );
}

#[tokio::test]
async fn a_migration_that_is_over_before_it_began_changes_nothing() {
    for strategy in Strategy::ALL.into_iter().filter(|it| !it.is_segue()) {
        let world = World::start(strategy, Topology::Shared).await;
        world.phase(VmimPhase::Failed);
        let name = match strategy {
            Strategy::OvnKubernetes => SOURCE,
            _ => "web",
        };
        let before = world.lsp(name).unwrap();
        let World {
            replica,
            replaying,
            _server,
            ..
        } = world;
        soon(replaying).await.unwrap().unwrap();
        let rows = replica.rows::<Lsp>();
        assert_eq!(rows.len(), 2, "{strategy}");
        let (_, after) = rows.iter().find(|(_, row)| row.name == name).unwrap();
        assert_eq!(**after, before, "{strategy}");
    }
}

#[tokio::test]
async fn a_replay_whose_watches_end_says_so() {
    let (seen, signs) = watch::channel(Seen::default());
    drop(seen);
    let error = Signs::new(signs).until(Seen::is_over).await.unwrap_err();
    assert!(matches!(error, Error::Deaf));
}
