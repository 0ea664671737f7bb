//! The hook as virt-handler calls it: gRPC over a Unix socket, a connection for each call.

use std::path::PathBuf;

use node_hooks_api::kubevirt::node_hook_service_client::NodeHookServiceClient;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tonic::Code;
use tonic::transport::{Endpoint, Uri};
use tower::service_fn;

use super::*;
use crate::metrics::Reading;

const SOON: Duration = Duration::from_secs(20);
const VMI: &str = r#"{"metadata":{"namespace":"demo","name":"web","uid":"u-1"},
    "status":{"migrationState":{"migrationUid":"m-1"}}}"#;

struct Served {
    path: PathBuf,
    gate: Gate,
    events: mpsc::UnboundedReceiver<Event>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    serving: JoinHandle<()>,
    _directory: TempDir,
}

impl Served {
    fn start(deadline: Duration, on_timeout: OnTimeout) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("segue.sock");
        let socket = Socket::bind(&path).unwrap();
        let (gate, events) = Gate::new();
        let (metrics, stop) = (Arc::new(Metrics::new()), CancellationToken::new());
        let patience = Patience {
            deadline,
            on_timeout,
        };
        let serving = serve(
            socket,
            gate.clone(),
            patience,
            metrics.clone(),
            stop.clone(),
        );
        Self {
            path,
            gate,
            events,
            metrics,
            stop,
            serving: tokio::spawn(serving),
            _directory: directory,
        }
    }

    fn call(&self, hook_point: &str, vmi: &str) -> JoinHandle<Result<(), Status>> {
        let path = self.path.clone();
        let request = ExecuteNodeHookRequest {
            hook_point: hook_point.to_owned(),
            vmi: vmi.as_bytes().to_vec(),
            node_context: None,
        };
        tokio::spawn(async move {
            let connector = service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            });
            let endpoint = Endpoint::from_static("http://localhost");
            let channel = endpoint.connect_with_connector(connector).await.unwrap();
            let mut client = NodeHookServiceClient::new(channel);
            client.execute_node_hook(request).await.map(|_| ())
        })
    }

    async fn event(&mut self) -> Event {
        timeout(SOON, self.events.recv()).await.unwrap().unwrap()
    }

    async fn asked(&mut self) -> (Call, Instance) {
        match self.event().await {
            Event::Asked { call, about } => (call, about),
            other @ Event::Withdrawn { .. } => panic!("{other:?}"),
        }
    }

    fn counted(&self, line: &str) -> bool {
        let text = self.metrics.expose(&Reading::default()).unwrap();
        text.lines().any(|found| found == line)
    }
}

async fn ended(call: JoinHandle<Result<(), Status>>) -> Result<(), Status> {
    timeout(SOON, call).await.unwrap().unwrap()
}

const LONG: Duration = Duration::from_mins(10);

#[tokio::test]
async fn a_migration_goes_when_the_controller_says_so() {
    let mut served = Served::start(LONG, OnTimeout::Fail);
    let call = served.call(GATE, VMI);
    let (number, about) = served.asked().await;
    assert_eq!(
        (about.name.as_str(), about.migration_uid.as_str()),
        ("web", "m-1")
    );
    assert!(!call.is_finished());
    served
        .gate
        .answer(BTreeSet::from([number]), Verdict::Go, "ready");
    ended(call).await.unwrap();
    assert!(served.counted("segue_agent_gate_answers_total{result=\"go\"} 1"));
    assert!(served.events.try_recv().is_err(), "nothing to withdraw");
}

#[tokio::test]
async fn a_migration_fails_with_the_controllers_reason() {
    let mut served = Served::start(LONG, OnTimeout::Ignore);
    let call = served.call(GATE, VMI);
    let (number, _) = served.asked().await;
    let calls = BTreeSet::from([number]);
    served
        .gate
        .answer(calls, Verdict::Fail, "no chassis for node2");
    let status = ended(call).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status.message().contains("no chassis for node2"),
        "{status}"
    );
}

#[tokio::test]
async fn other_hook_points_are_answered_at_once() {
    let served = Served::start(LONG, OnTimeout::Fail);
    for point in ["PreVMStart", "PostMigrationTarget", ""] {
        ended(served.call(point, "not even JSON")).await.unwrap();
    }
}

#[tokio::test]
async fn nonsense_is_refused_with_a_reason() {
    let mut served = Served::start(LONG, OnTimeout::Ignore);
    let status = ended(served.call(GATE, r#"{"metadata":{}}"#))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("metadata.namespace"), "{status}");
    assert!(served.events.try_recv().is_err());
}

#[rstest::rstest]
#[case(OnTimeout::Ignore, None)]
#[case(OnTimeout::Fail, Some(Code::FailedPrecondition))]
#[tokio::test]
async fn at_the_deadline_it_goes_or_fails_as_told(
    #[case] on_timeout: OnTimeout,
    #[case] code: Option<Code>,
) {
    let mut served = Served::start(Duration::from_millis(50), on_timeout);
    let call = served.call(GATE, VMI);
    let (number, _) = served.asked().await;
    let status = ended(call).await.err().map(|status| status.code());
    assert_eq!(status, code);
    assert_eq!(served.event().await, Event::Withdrawn { call: number });
    // The answer that comes too late reaches nobody.
    served
        .gate
        .answer(BTreeSet::from([number]), Verdict::Go, "");
}

#[tokio::test]
async fn a_cancelled_call_leaves_nothing() {
    let mut served = Served::start(LONG, OnTimeout::Fail);
    let call = served.call(GATE, VMI);
    let (number, _) = served.asked().await;
    call.abort();
    assert_eq!(served.event().await, Event::Withdrawn { call: number });
    assert!(served.gate.lock().is_empty());
    assert!(served.counted("segue_agent_gate_answers_total{result=\"cancelled\"} 1"));
}

#[tokio::test]
async fn when_the_agent_stops_callers_are_answered_as_at_the_deadline() {
    let mut served = Served::start(LONG, OnTimeout::Ignore);
    let call = served.call(GATE, VMI);
    served.asked().await;
    served.stop.cancel();
    ended(call).await.unwrap();
    timeout(SOON, &mut served.serving).await.unwrap().unwrap();
    assert!(!served.path.exists());
}
