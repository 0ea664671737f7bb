//! A plugin's node hook, called as virt-handler calls it.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt as _};
use node_hooks_api::kubevirt::node_hook_service_server::{NodeHookService, NodeHookServiceServer};
use node_hooks_api::kubevirt::{ExecuteNodeHookRequest, ExecuteNodeHookResponse};
use scenarios::kubevirt::{
    HookCall, HookResult, Hypervisor as _, Plugin, PluginSpec, VirtualMachineInstance, VmimPhase,
};
use serde_json::json;
use tokio::net::UnixListener;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::cluster::{Cluster, within};
use crate::copying;
use crate::fake::Copies;

const SOCKET: &str = "/var/run/kubevirt/plugins/gate.sock";

type Asked = (ExecuteNodeHookRequest, oneshot::Sender<Result<(), Status>>);

/// A plugin that answers as the test says.
struct Gate(mpsc::UnboundedSender<Asked>);

#[tonic::async_trait]
impl NodeHookService for Gate {
    async fn execute_node_hook(
        &self,
        request: Request<ExecuteNodeHookRequest>,
    ) -> Result<Response<ExecuteNodeHookResponse>, Status> {
        let (answer, answered) = oneshot::channel();
        self.0.send((request.into_inner(), answer)).unwrap();
        let answer = answered.await.unwrap();
        answer.map(|()| Response::new(ExecuteNodeHookResponse {}))
    }
}

fn serve(cluster: &Cluster, node: &str) -> (mpsc::UnboundedReceiver<Asked>, AbortHandle) {
    let path = cluster.fake.on_node(node, Path::new(SOCKET));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let _ = fs::remove_file(&path);
    let listener = UnixListenerStream::new(UnixListener::bind(path).unwrap());
    let (sender, receiver) = mpsc::unbounded_channel();
    let service = NodeHookServiceServer::new(Gate(sender));
    let serving = Server::builder().serve_with_incoming(service, listener);
    (receiver, tokio::spawn(serving).abort_handle())
}

async fn install(cluster: &Cluster, hook: serde_json::Value) -> Api<Plugin> {
    let plugins: Api<Plugin> = Api::all(cluster.plane.client());
    let spec: PluginSpec = serde_json::from_value(json!({"nodeHooks": [hook]})).unwrap();
    let plugin = Plugin::new("gate", spec);
    plugins
        .create(&PostParams::default(), &plugin)
        .await
        .unwrap();
    plugins
}

async fn next(calls: &mut broadcast::Receiver<HookCall>) -> HookResult {
    let call = within("a hook's call", calls.recv()).await.unwrap();
    assert_eq!(
        (call.node.as_str(), call.vmi.as_str()),
        ("a", "default/vm0")
    );
    assert!(call.at <= SystemTime::now());
    call.result
}

#[tokio::test]
async fn a_copy_waits_for_a_plugin_and_a_refusal_is_asked_again() {
    let cluster = Cluster::start(&["a", "b"]).await;
    cluster.run_vm("vm0").await;
    let hook = json!({"socket": SOCKET, "permittedHooks": ["PreMigrationSource"]});
    install(&cluster, hook).await;
    let (mut asked, _) = serve(&cluster, "a");
    let mut calls = cluster.kubevirt.hook_calls();
    let migration = cluster.migrate("m1", "vm0").await;

    let (request, answer) = within("the question", asked.recv()).await.unwrap();
    assert_eq!(request.hook_point, "PreMigrationSource");
    assert_eq!(request.node_context.unwrap().node_name, "a");
    let vmi: VirtualMachineInstance = serde_json::from_slice(&request.vmi).unwrap();
    let state = vmi.status.unwrap().migration_state.unwrap();
    assert_eq!(state.migration_uid, migration.uid());
    assert_eq!(cluster.fake.copies_started(), 0);
    assert_eq!(next(&mut calls).await, HookResult::Asked);

    let refusal = Status::failed_precondition("not ready");
    answer.send(Err(refusal)).unwrap();
    let HookResult::Failed(why) = next(&mut calls).await else {
        panic!("the refusal was not taken for one");
    };
    assert!(why.contains("not ready"), "{why}");
    let (_, answer) = within("the question again", asked.recv()).await.unwrap();
    assert_eq!(cluster.fake.copies_started(), 0);
    let events = cluster.events_on(&vmi.metadata.uid.unwrap()).await;
    assert!(
        events.iter().any(|event| event == "SyncFailed"),
        "{events:?}"
    );

    answer.send(Ok(())).unwrap();
    copying(&cluster, "vm0", &migration).await;
    assert_eq!(next(&mut calls).await, HookResult::Asked);
    assert_eq!(next(&mut calls).await, HookResult::Agreed);
    cluster.stop().await;
}

#[tokio::test]
async fn a_plugin_that_is_not_there_or_silent_is_ignored_where_its_hook_says_so() {
    let cluster = Cluster::start(&["a", "b"]).await;
    cluster.run_vm("vm0").await;
    cluster.fake.copies(Copies::Succeed);
    let hook = json!({
        "socket": SOCKET,
        "permittedHooks": ["PreVMStart", "PreMigrationSource"],
        "failureStrategy": "Ignore",
        "timeout": "200ms",
    });
    let plugins = install(&cluster, hook).await;
    let mut calls = cluster.kubevirt.hook_calls();
    cluster.migrate("absent", "vm0").await;
    cluster.wait_phase("absent", VmimPhase::Succeeded).await;
    assert_eq!(next(&mut calls).await, HookResult::Asked);
    let HookResult::Ignored(why) = next(&mut calls).await else {
        panic!("nobody is there");
    };
    assert!(why.contains("cannot dial"), "{why}");

    // The VM is on b now.
    cluster.wait_final("absent").await;
    let (mut asked, serving) = serve(&cluster, "b");
    let mut calls = cluster.kubevirt.hook_calls();
    cluster.migrate("silent", "vm0").await;
    let unanswered = within("the question", asked.recv()).await.unwrap();
    cluster.wait_phase("silent", VmimPhase::Succeeded).await;
    let mut results = Vec::new();
    while let Ok(call) = calls.try_recv() {
        results.push(call.result);
    }
    assert!(
        matches!(
            results.as_slice(),
            [HookResult::Asked, HookResult::Ignored(_)]
        ),
        "{results:?}"
    );
    drop(unanswered);
    serving.abort();
    plugins
        .delete("gate", &DeleteParams::default())
        .await
        .unwrap();
    cluster.stop().await;
}
