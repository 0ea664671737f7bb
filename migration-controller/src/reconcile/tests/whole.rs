//! All of the controller but its process: watches of an API server that is made up, real OVSDB
//! servers in which the test is northd and the ovn-controllers, and agents that do as they are told.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{StreamExt, stream};
use handover::{FlipPolicy, FlipTiming, GatePolicy, SignalKind, SignalSource};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::{Method, Request, Response, StatusCode};
use kube::Client;
use kube::client::Body;
use kube::runtime::events::{Recorder, Reporter};
use node_hooks_api::agent as wire;
use node_hooks_api::agent::from_agent::Message as Told;
use node_hooks_api::agent::to_agent::Message;
use ovsdb_rs::{Condition, Datum, Mutation, Row, Transaction};
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};
use wire::signal::{Kind, Source};

use super::super::{Reception, Reconciler, Said, Work};
use super::*;
use crate::agents::Hub;
use crate::agents::tests::{Agent, Door};
use crate::api::OpeningResult;
use crate::cluster::{Cluster, watch_all};
use crate::metrics::Metrics;
use crate::ovn::LogicalSwitchPort;
use crate::ovn::server::soon;
use crate::policy::Settings;
use crate::routed::tests::{DUAL, Lab, Plan, texts};

const SOUTHBOUND: &str = "OVN_Southbound";
const PORT: &str = "w0.tenant";

type Answer = UnsyncBoxBody<Bytes, Infallible>;

/// What the API server has been given, and how it behaves.
#[derive(Default)]
struct Api {
    hangs: AtomicBool,
    spec: Mutex<Value>,
    version: Mutex<u64>,
    events: Mutex<Vec<String>>,
}

struct World {
    lab: Lab,
    api: Arc<Api>,
    cluster: Arc<Cluster>,
    door: Door,
    _tasks: JoinSet<()>,
    _stop: DropGuard,
}

// === impl Api ===

impl Api {
    fn client(self: &Arc<Self>) -> Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        });
        Client::new(service, "default")
    }

    async fn answer(&self, request: Request<Body>) -> Response<Answer> {
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        let query = head.uri.query().unwrap_or_default();
        if head.method == Method::GET {
            let of_one = path.contains("/namespaces/");
            return match () {
                () if query.contains("watch=true") => silence(),
                () if of_one => {
                    let status = json!({ "status": "Failure", "reason": "NotFound", "code": 404 });
                    said(StatusCode::NOT_FOUND, &status)
                }
                () => said(StatusCode::OK, &list(path)),
            };
        }
        if self.hangs.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let sent = body.collect().await.unwrap().to_bytes();
        let mut object: Value = serde_json::from_slice(&sent).unwrap();
        if let Some(reason) = object["reason"].as_str() {
            self.events.lock().unwrap().push(reason.to_owned());
        }
        let mut version = self.version.lock().unwrap();
        *version += 1;
        object["metadata"]["namespace"] = json!("tenant");
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let mut spec = self.spec.lock().unwrap();
        if object["spec"].is_object() {
            *spec = object["spec"].clone();
        } else {
            object["spec"] = spec.clone();
        }
        said(StatusCode::OK, &object)
    }
}

fn list(path: &str) -> Value {
    let told = json!({ "migrationUid": "m-1", "sourceNode": "n1", "targetNode": "n2",
        "sourcePod": "pod-a", "targetPod": "pod-b" });
    let object = |kind: &str, name: &str, uid: &str, spec: Value, status: Value| {
        json!({ "apiVersion": "kubevirt.io/v1", "kind": kind, "spec": spec, "status": status,
            "metadata": { "name": name, "namespace": "tenant", "uid": uid, "resourceVersion": "1",
                "creationTimestamp": SECOND } })
    };
    let items = match path {
        "/apis/kubevirt.io/v1/virtualmachineinstances" => {
            let status = json!({ "nodeName": "n1", "phase": "Running", "migrationState": told });
            let kind = "VirtualMachineInstance";
            vec![object(kind, "w0", "v-1", json!({}), status)]
        }
        "/apis/kubevirt.io/v1/virtualmachineinstancemigrations" => {
            let (spec, status) = (json!({ "vmiName": "w0" }), json!({ "phase": "Running" }));
            let kind = "VirtualMachineInstanceMigration";
            vec![object(kind, "m", "m-1", spec, status)]
        }
        _ => Vec::new(),
    };
    json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": "1" },
        "items": items })
}

fn said(status: StatusCode, object: &Value) -> Response<Answer> {
    let body = Full::from(object.to_string()).boxed_unsync();
    Response::builder().status(status).body(body).unwrap()
}

/// A watch in which nothing happens.
fn silence() -> Response<Answer> {
    let nothing = stream::pending::<Result<Frame<Bytes>, Infallible>>().boxed();
    Response::new(StreamBody::new(nothing).boxed_unsync())
}

// === impl World ===

impl World {
    /// A guest on n1 that migrates to n2, on a routed switch. Nothing has been written.
    async fn start(timing: FlipTiming) -> Self {
        let mut plan = Plan::cluster(&DUAL[..2]);
        plan.machine("sw-c1", PORT, "10.20.1.10 fd20::10");
        let lab = Lab::kept(plan).await;
        lab.southbound
            .transact(SOUTHBOUND, bound_to_source())
            .await
            .unwrap();
        let (api, stop) = (Arc::new(Api::default()), CancellationToken::new());
        let (cluster, metrics) = (Arc::new(Cluster::default()), Arc::new(Metrics::new()));
        let work = Arc::new(Work::new(cluster.clone(), metrics.clone()));
        work.attach(lab.databases.clone());
        let settings = Settings {
            deadlines: Deadlines::default(),
            mode: RoutingMode::AddressSets,
            flip: FlipPolicy {
                timing,
                ..FlipPolicy::default()
            },
            gate: GatePolicy::default(),
        };
        let reception = Reception {
            work: work.clone(),
            cluster: cluster.clone(),
            settings,
        };
        let hub = Arc::new(Hub::new(Arc::new(reception), metrics.agents.clone()));
        hub.lead(true);
        let door = Door::open(&hub, &metrics.agents, &stop);
        let client = api.client();
        let reconciler = Arc::new(Reconciler {
            cluster: cluster.clone(),
            databases: lab.databases.clone(),
            writer: lab.writer.clone(),
            recorder: Recorder::new(client.clone(), Reporter::from("test")),
            client: client.clone(),
            metrics,
            work: work.clone(),
            hub,
            settings,
            pod_gone_grace: Duration::from_mins(1),
            // Longer than any test takes on a machine that has other things to do.
            in_transit: Duration::from_mins(1),
            unsaved: Mutex::default(),
            said: Said::default(),
        });
        let mut tasks = JoinSet::new();
        watch_all(&client, &cluster, &work, &stop, &mut tasks);
        for northbound in [true, false] {
            let databases = lab.databases.clone();
            let (work, cluster, stop) = (work.clone(), cluster.clone(), stop.clone());
            tasks.spawn(async move {
                if northbound {
                    databases.follow_northbound(&*work, &*cluster, &stop).await;
                } else {
                    databases.follow_southbound(&*work, &*cluster, &stop).await;
                }
            });
        }
        reconciler.start(2, &stop, &mut tasks);
        Self {
            lab,
            api,
            cluster,
            door,
            _tasks: tasks,
            _stop: stop.drop_guard(),
        }
    }

    /// Agents on both nodes, and the handover ready.
    async fn ready(timing: FlipTiming) -> (Self, [Agent; 2]) {
        let world = Self::start(timing).await;
        let mut source = world.door.agent("n1").await;
        let mut target = world.door.agent("n2").await;
        for agent in [&mut source, &mut target] {
            let told = soon(agent.next()).await;
            assert!(matches!(told, Message::Arm(_)), "{told:?}");
        }
        world.claim().await;
        world.until_phase(Phase::Ready).await;
        assert_eq!(world.lab.members("c1"), addresses());
        (world, [source, target])
    }

    fn handover(&self) -> Option<Arc<Handover>> {
        self.cluster.vm(&vm()).handovers.first().cloned()
    }

    async fn until_phase(&self, phase: Phase) -> Arc<Handover> {
        until(|| {
            let handover = self.handover()?;
            let found = handover.status.as_ref()?.phase;
            (found == phase).then_some(handover)
        })
        .await
    }

    async fn until_members(&self, chassis: &str) {
        until(|| (self.lab.members(chassis) == addresses()).then_some(())).await;
    }

    fn requested(&self) -> Option<String> {
        let rows = self.lab.nb().rows::<LogicalSwitchPort>();
        let (_, port) = rows.iter().find(|(_, port)| port.name == PORT)?;
        port.options.get("requested-chassis").cloned()
    }

    /// The target claims the port, once it is asked to, and both chassis follow what comes of it.
    async fn claim(&self) {
        until(|| (self.requested()? == "c1,c2").then_some(())).await;
        let mut tx = Transaction::new();
        let c2 = self.chassis("c2").await;
        let port = Condition::eq("logical_port", PORT);
        let add = [Mutation::insert("additional_chassis", c2)];
        tx.mutate("Port_Binding", port, add);
        self.southbound(tx).await;
        until(|| {
            let rows = self.lab.nb().rows::<crate::ovn::NbGlobal>();
            (rows.first()?.1.nb_cfg == 1).then_some(())
        })
        .await;
        let mut tx = Transaction::new();
        tx.update(
            "Chassis_Private",
            Vec::<Condition>::new(),
            Row::new().set("nb_cfg", 1),
        );
        self.southbound(tx).await;
    }

    /// The target's ovn-controller saw the announcement.
    async fn activate(&self) {
        let mut tx = Transaction::new();
        let activated = Datum::map([("additional-chassis-activated", "c2")]);
        let port = Condition::eq("logical_port", PORT);
        tx.update("Port_Binding", port, Row::new().set("options", activated));
        self.southbound(tx).await;
    }

    async fn chassis(&self, name: &str) -> uuid::Uuid {
        let [_, (_, sb)] = self.lab.databases.replicas();
        until(|| {
            let rows = sb.rows::<crate::ovn::Chassis>();
            let (uuid, _) = rows.iter().find(|(_, row)| row.name == name)?;
            Some(*uuid)
        })
        .await
    }

    async fn southbound(&self, tx: Transaction) {
        self.lab.southbound.transact(SOUTHBOUND, tx).await.unwrap();
    }
}

/// Two chassis, with the port bound to the first.
fn bound_to_source() -> Transaction {
    let mut tx = Transaction::new();
    let mut chassis = |name: &str, node: &str, ip: &str| {
        let encap = Row::new()
            .set("type", "geneve")
            .set("ip", ip)
            .set("chassis_name", name);
        let encap = tx.insert("Encap", encap);
        let row = Row::new()
            .set("name", name)
            .set("hostname", node)
            .set("encaps", encap);
        let uuid = tx.insert("Chassis", row);
        let private = Row::new().set("name", name).set("chassis", uuid);
        tx.insert("Chassis_Private", private);
        uuid
    };
    let c1 = chassis("c1", "n1", "192.0.2.1");
    chassis("c2", "n2", "192.0.2.2");
    let datapath = tx.insert("Datapath_Binding", Row::new().set("tunnel_key", 1));
    let binding = Row::new()
        .set("logical_port", PORT)
        .set("datapath", datapath)
        .set("tunnel_key", 1)
        .set("chassis", c1);
    tx.insert("Port_Binding", binding);
    tx
}

fn addresses() -> BTreeSet<String> {
    texts(&["10.20.1.10", "fd20::10"])
}

async fn until<T>(mut condition: impl FnMut() -> Option<T>) -> T {
    soon(async {
        loop {
            if let Some(found) = condition() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
}

fn signal(world: &World, kind: Kind, source: Source) -> Told {
    let epoch = world.handover().unwrap().spec.epoch().0;
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    let now = u64::try_from(now.as_nanos()).unwrap();
    Told::Signal(wire::Signal {
        id: Some(wire::HandoverId {
            namespace: "tenant".into(),
            vm: "w0".into(),
            migration_uid: "m-1".into(),
            epoch,
        }),
        kind: kind.into(),
        source: source.into(),
        at_ns: now,
        seen_at_ns: now,
        port: String::new(),
    })
}

async fn open(target: &mut Agent) -> wire::Open {
    match soon(target.next()).await {
        Message::Open(open) => open,
        other => panic!("no Open but {other:?}"),
    }
}

fn done(open: &wire::Open) -> Told {
    Told::Outcome(wire::Outcome {
        id: open.id.clone(),
        command: open.command,
        result: wire::outcome::Result::Done.into(),
        reason: String::new(),
        hops: Some(wire::Hops {
            received_at_ns: open.heard_at_ns + 1_000,
            sent_at_ns: open.heard_at_ns + 2_000,
            processed_at_ns: open.heard_at_ns + 5_000,
        }),
    })
}

#[tokio::test]
async fn routes_follow_the_resume_while_the_api_server_hangs_and_all_of_it_is_recorded_after() {
    let (world, [source, mut target]) = World::ready(FlipTiming::OnResume).await;
    world.api.hangs.store(true, Ordering::SeqCst);
    source
        .say(signal(&world, Kind::Paused, Source::Libvirt))
        .await;
    let order = open(&mut target).await;
    target.say(done(&order)).await;
    assert_eq!(
        world.lab.members("c1"),
        addresses(),
        "not before the resume"
    );
    let begin = std::time::Instant::now();
    target
        .say(signal(&world, Kind::Resumed, Source::Libvirt))
        .await;
    world.until_members("c2").await;
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "{:?}",
        begin.elapsed()
    );
    world.api.hangs.store(false, Ordering::SeqCst);

    let handover = world.until_phase(Phase::Switched).await;
    let status = handover.status.as_ref().unwrap();
    let opening = status.early_opening.as_ref().unwrap();
    assert_eq!(opening.result, OpeningResult::Opened);
    let hops = (opening.received_to_sent_us, opening.sent_to_processed_us);
    assert_eq!(hops, (Some(1), Some(3)));
    assert!(status.pause_ms.is_some());
    let steps: Vec<_> = status.timeline.iter().map(|entry| entry.step).collect();
    for step in [
        TimelineStep::Paused,
        TimelineStep::Opened,
        TimelineStep::Resumed,
    ] {
        assert!(steps.contains(&step), "{steps:?}");
    }
    let told = |node: &str| {
        status
            .signals
            .iter()
            .any(|seen| seen.node.as_deref() == Some(node))
    };
    assert!(told("n1") && told("n2"), "{:?}", status.signals);
    until(|| {
        let events = world.api.events.lock().unwrap();
        events.contains(&"GuestMoved".to_owned()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn ahead_of_the_resume_where_asked_and_back_when_the_source_resumes() {
    let (world, [mut source, mut target]) = World::ready(FlipTiming::OnPause).await;
    source
        .say(signal(&world, Kind::Paused, Source::Libvirt))
        .await;
    let order = open(&mut target).await;
    target.say(done(&order)).await;
    world.until_members("c2").await;
    source
        .say(signal(&world, Kind::Resumed, Source::Libvirt))
        .await;
    world.until_members("c1").await;
    let told = soon(source.next()).await;
    assert!(matches!(told, Message::Announce(_)), "{told:?}");
    let handover = world.until_phase(Phase::RollingBack).await;
    let status = handover.status.as_ref().unwrap();
    assert_eq!(status.waiting_for.as_deref(), Some("Outcome"));
    let requested = world.requested();
    assert_eq!(
        requested.as_deref(),
        Some("c1,c2"),
        "KubeVirt has not said so"
    );
}

#[tokio::test]
async fn a_guest_that_a_person_paused_and_resumed_is_followed_when_it_leaves_after_all() {
    let (world, [mut source, mut target]) = World::ready(FlipTiming::OnResume).await;
    let libvirt = |kind| signal(&world, kind, Source::Libvirt);
    source.say(libvirt(Kind::Paused)).await;
    let order = open(&mut target).await;
    target.say(done(&order)).await;
    target.all_said().await;
    source.say(libvirt(Kind::Resumed)).await;
    world.until_phase(Phase::RollingBack).await;
    // The opening's doing, which says nothing of the guest any more.
    world.activate().await;
    source.say(libvirt(Kind::Paused)).await;
    source.all_said().await;
    assert_eq!(world.lab.members("c1"), addresses());
    target.say(libvirt(Kind::Resumed)).await;
    world.until_members("c2").await;
    let handover = world.until_phase(Phase::Switched).await;
    let signals = &handover.status.as_ref().unwrap().signals;
    let kinds: Vec<_> = signals.iter().map(|seen| seen.kind).collect();
    assert_eq!(
        kinds,
        [
            SignalKind::Paused,
            SignalKind::ResumedOnSource,
            SignalKind::Paused,
            SignalKind::ResumedOnTarget
        ]
    );
    let by_ovn = |seen: &crate::api::SignalSeen| seen.source == SignalSource::Activation;
    assert!(!signals.iter().any(by_ovn), "{signals:?}");
}

#[tokio::test]
async fn without_agents_ovns_own_activation_leads_the_routes() {
    let world = World::start(FlipTiming::OnResume).await;
    world.claim().await;
    world.until_phase(Phase::Ready).await;
    world.activate().await;
    world.until_members("c2").await;
    let handover = world.until_phase(Phase::Switched).await;
    let status = handover.status.as_ref().unwrap();
    let seen: Vec<_> = status
        .signals
        .iter()
        .map(|seen| (seen.kind, seen.source))
        .collect();
    assert_eq!(
        seen,
        [(SignalKind::ResumedOnTarget, SignalSource::Activation)]
    );
    assert_eq!(status.early_opening, None);
}

#[tokio::test]
async fn without_an_agent_on_the_target_it_is_left_to_ovn() {
    let world = World::start(FlipTiming::OnResume).await;
    let mut source = world.door.agent("n1").await;
    assert!(matches!(soon(source.next()).await, Message::Arm(_)));
    world.claim().await;
    world.until_phase(Phase::Ready).await;
    source
        .say(signal(&world, Kind::Paused, Source::Libvirt))
        .await;
    world.activate().await;
    world.until_members("c2").await;
}

#[tokio::test]
async fn the_gate_opens_when_the_handover_is_ready() {
    let world = World::start(FlipTiming::OnResume).await;
    let mut source = world.door.agent("n1").await;
    assert!(matches!(soon(source.next()).await, Message::Arm(_)));
    let question = wire::GateQuestion {
        question: 1,
        namespace: "tenant".into(),
        vm: "w0".into(),
        vmi_uid: "v-1".into(),
        migration_uid: "m-1".into(),
    };
    source.say(Told::GateQuestion(question.clone())).await;
    let stray = wire::GateQuestion {
        question: 2,
        vm: "portless".into(),
        vmi_uid: String::new(),
        migration_uid: String::new(),
        ..question
    };
    source.say(Told::GateQuestion(stray)).await;
    world.until_phase(Phase::Preparing).await;
    assert!(source.all_said().await.is_empty(), "it is not ready");
    world.claim().await;
    let told = soon(source.next()).await;
    let Message::GateAnswer(answer) = told else {
        panic!("no answer but {told:?}");
    };
    assert_eq!(
        (answer.question, answer.verdict()),
        (1, wire::gate_answer::Verdict::Go)
    );
    assert!(world.requested().is_some());
}
