//! The Kubernetes server: real etcd, kube-apiserver and kubectl on loopback, without root.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests assert by panicking, as tests do"
)]

use std::{collections::BTreeMap, path::Path};

use k8s_openapi::{
    api::{
        authorization::v1::{
            ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
        },
        core::v1::ConfigMap,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{ListParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::wait::{await_condition, conditions::is_crd_established},
};
use migration_controller::api::HandoverPolicy;
use scenarios::kubernetes::{Assets, ControlPlane, Error, Port, Settings, here};
use serde_json::json;
use tempfile::TempDir;

fn settings(directory: &Path) -> Settings {
    Settings {
        assets: Assets::find().unwrap_or_else(|error| panic!("{error}")),
        directory: directory.join("kubernetes"),
        address: [127, 0, 0, 1].into(),
        port: Port::Free,
    }
}

async fn start() -> (ControlPlane, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let plane = ControlPlane::start(settings(directory.path()), &here()).await;
    (plane.unwrap_or_else(|error| panic!("{error}")), directory)
}

/// What an operator would apply, as small as it gets: a service account that may read ConfigMaps of its namespace.
fn kustomization(directory: &Path) {
    std::fs::write(
        directory.join("kustomization.yaml"),
        "namespace: tools\nresources: [all.yaml]\n",
    )
    .unwrap();
    let yaml = "
apiVersion: v1
kind: Namespace
metadata: {name: tools}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: reader}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader}
rules: [{apiGroups: [''], resources: [configmaps], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: ServiceAccount, name: reader, namespace: tools}]
";
    std::fs::write(directory.join("all.yaml"), yaml).unwrap();
}

async fn client_of(kubeconfig: &Path) -> Client {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .unwrap();
    Client::try_from(config).unwrap()
}

async fn may(client: &Client, verb: &str, resource: &str, namespace: &str) -> bool {
    let attributes = ResourceAttributes {
        verb: Some(verb.into()),
        resource: Some(resource.into()),
        namespace: Some(namespace.into()),
        ..ResourceAttributes::default()
    };
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(attributes),
            ..Default::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    reviews
        .create(&PostParams::default(), &review)
        .await
        .unwrap()
        .status
        .unwrap()
        .allowed
}

#[tokio::test]
async fn an_applied_service_account_may_do_what_its_role_says_and_no_more() {
    let (plane, directory) = start().await;
    kustomization(directory.path());
    for applied in ["created", "unchanged"] {
        let output = plane
            .kubectl()
            .apply_kustomization(directory.path())
            .await
            .unwrap();
        assert!(
            output.contains(&format!("serviceaccount/reader {applied}")),
            "{output}"
        );
    }

    let kubeconfig = plane
        .kubeconfig_of_service_account("tools", "reader")
        .await
        .unwrap();
    let reader = client_of(&kubeconfig).await;
    assert!(may(&reader, "list", "configmaps", "tools").await);
    assert!(!may(&reader, "list", "configmaps", "default").await);
    assert!(!may(&reader, "create", "configmaps", "tools").await);
    let maps: Api<ConfigMap> = Api::namespaced(reader.clone(), "tools");
    maps.list(&ListParams::default()).await.unwrap();
    let refused = maps
        .create(&PostParams::default(), &ConfigMap::default())
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, kube::Error::Api(status) if status.code == 403),
        "{refused}"
    );

    assert!(
        may(
            &client_of(&plane.admin_kubeconfig()).await,
            "*",
            "*",
            "default"
        )
        .await
    );
    plane.stop().await.unwrap();
}

#[tokio::test]
async fn the_shipped_manifests_apply_and_their_account_cannot_touch_what_kubevirt_owns() {
    let (plane, _directory) = start().await;
    plane.apply_kubevirt_crds().await.unwrap();
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    plane
        .kubectl()
        .apply_kustomization(&manifests)
        .await
        .unwrap();
    let kubeconfig = plane
        .kubeconfig_of_service_account("segue-system", "migration-controller")
        .await
        .unwrap();

    let flag = format!("--kubeconfig={}", kubeconfig.display());
    let can = async |verb: &str, resource: &str| {
        // kubectl says no with an exit code, too.
        let answer = plane
            .kubectl()
            .run([
                "auth",
                "can-i",
                verb,
                resource,
                "--all-namespaces",
                "-q",
                &flag,
            ])
            .await;
        answer.is_ok()
    };
    for (verb, resource) in [
        ("watch", "virtualmachineinstancemigrations.kubevirt.io"),
        ("watch", "virtualmachineinstances.kubevirt.io"),
        ("watch", "pods"),
        ("watch", "nodes"),
        ("patch", "handovers.segue.io/status"),
        ("create", "events.events.k8s.io"),
    ] {
        assert!(can(verb, resource).await, "{verb} {resource}");
    }
    for resource in [
        "virtualmachineinstances.kubevirt.io",
        "virtualmachineinstancemigrations.kubevirt.io",
        "pods",
    ] {
        for verb in ["create", "update", "patch", "delete"] {
            assert!(!can(verb, resource).await, "{verb} {resource}");
        }
    }
    assert!(!can("get", "secrets").await);
    plane.stop().await.unwrap();
}

/// What the API says of policies that contradict themselves: the field, and a word of the rule's message.
#[tokio::test]
async fn a_policy_that_contradicts_itself_is_refused_by_the_api() {
    let (plane, _directory) = start().await;
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    plane
        .kubectl()
        .apply_kustomization(&manifests)
        .await
        .unwrap();
    let crds: Api<CustomResourceDefinition> = Api::all(plane.client());
    let served = await_condition(crds, "handoverpolicies.segue.io", is_crd_established());
    let crd = served.await.unwrap().unwrap();
    let refused = [
        (
            json!({"routing": {"mode": "StaticRoutes", "keepEgressSeconds": 5}}),
            "spec.routing",
            "only AddressSets can keep egress",
        ),
        (
            json!({"routing": {"flip": "OnPause", "keepEgressSeconds": 5}}),
            "spec.routing",
            "cannot flip on the pause",
        ),
        (
            json!({"vmSelector": {"matchExpressions": [{"key": "tier", "operator": "In"}]}}),
            "spec.vmSelector.matchExpressions[0]",
            "In and NotIn need values",
        ),
    ];
    let rules = serde_json::to_string(&crd).unwrap();
    assert_eq!(
        rules.matches(r#""rule":"#).count(),
        refused.len(),
        "every rule is tried"
    );

    let policies: Api<HandoverPolicy> = Api::all(plane.client());
    let create = async |spec: &serde_json::Value| {
        let policy = HandoverPolicy::new("tried", serde_json::from_value(spec.clone()).unwrap());
        policies.create(&PostParams::default(), &policy).await
    };
    for (spec, field, why) in &refused {
        let Err(kube::Error::Api(status)) = create(spec).await else {
            panic!("the API takes {spec}")
        };
        assert_eq!((status.code, status.reason.as_str()), (422, "Invalid"));
        let details = status.details.as_ref().unwrap();
        let fields: Vec<_> = details.causes.iter().map(|cause| &cause.field).collect();
        assert_eq!(fields, [field], "{status:?}");
        assert!(status.message.contains(why), "{status:?}");
    }
    let fine = json!({
        "namespaces": ["demo"],
        "vmSelector": {"matchExpressions": [
            {"key": "tier", "operator": "In", "values": ["web"]},
            {"key": "legacy", "operator": "DoesNotExist"},
        ]},
        "routing": {"mode": "AddressSets", "flip": "OnResume", "keepEgressSeconds": 5},
        "deadlines": {"peersSeconds": 1.5},
    });
    create(&fine).await.unwrap();
    plane.stop().await.unwrap();
}

#[tokio::test]
async fn a_missing_service_account_and_a_broken_manifest_are_named() {
    let (plane, directory) = start().await;
    let error = plane
        .kubeconfig_of_service_account("default", "nobody")
        .await
        .unwrap_err();
    assert!(error.to_string().contains("default/nobody"), "{error}");

    std::fs::write(
        directory.path().join("kustomization.yaml"),
        "resources: [absent.yaml]\n",
    )
    .unwrap();
    let error = plane
        .kubectl()
        .apply_kustomization(directory.path())
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Kubectl { stderr, .. } if stderr.contains("absent.yaml")),
        "{error}"
    );
    plane.stop().await.unwrap();
}

#[tokio::test]
async fn kubevirt_crds_have_its_versions_and_subresources() {
    let (plane, _directory) = start().await;
    plane.apply_kubevirt_crds().await.unwrap();
    plane.apply_kubevirt_crds().await.unwrap();

    let crds: Api<CustomResourceDefinition> = Api::all(plane.client());
    let with_status: BTreeMap<_, _> = crds
        .list(&ListParams::default())
        .await
        .unwrap()
        .into_iter()
        .map(|crd| {
            let versions: Vec<_> = crd
                .spec
                .versions
                .iter()
                .map(|version| (version.name.clone(), version.storage))
                .collect();
            let expected: &[_] = match crd.spec.group.as_str() {
                "plugin.kubevirt.io" => &[("v1alpha1".to_owned(), true)],
                _ => &[("v1".to_owned(), true), ("v1alpha3".to_owned(), false)],
            };
            assert_eq!(versions, expected, "{}", crd.name_any());
            let status = crd
                .spec
                .versions
                .iter()
                .all(|version| version.subresources.is_some());
            (crd.spec.names.kind, status)
        })
        .collect();
    let expected = [
        ("Plugin", false),
        ("VirtualMachine", true),
        ("VirtualMachineInstance", false),
        ("VirtualMachineInstanceMigration", true),
    ];
    assert_eq!(
        with_status,
        expected
            .map(|(kind, status)| (kind.to_owned(), status))
            .into()
    );
    plane.stop().await.unwrap();
}

#[tokio::test]
async fn two_servers_run_side_by_side_and_a_stopped_one_is_gone() {
    let ((first, _a), (second, _b)) = tokio::join!(start(), start());
    assert_ne!(first.address(), second.address());
    let (address, client) = (first.address(), first.client());
    first.stop().await.unwrap();
    client.apiserver_version().await.unwrap_err();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
    second.client().apiserver_version().await.unwrap();
    second.stop().await.unwrap();
}

#[tokio::test]
async fn a_server_that_cannot_start_shows_its_log() {
    let (other, _other_directory) = start().await;
    let directory = tempfile::tempdir().unwrap();
    let mut settings = settings(directory.path());
    settings.port = Port::Fixed(other.address().port());
    let Err(error) = ControlPlane::start(settings, &here()).await else {
        panic!("it started on a port in use")
    };
    assert!(
        matches!(
            &error,
            Error::Exited {
                name: "kube-apiserver",
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error.to_string().contains("address already in use"),
        "{error}"
    );
    other.stop().await.unwrap();
}

#[tokio::test]
async fn a_directory_too_deep_for_a_socket_is_refused_before_anything_starts() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(&directory.path().join("d".repeat(100)));
    let Err(error) = ControlPlane::start(settings, &here()).await else {
        panic!("it started")
    };
    assert!(matches!(error, Error::SocketPath { .. }), "{error}");
}
