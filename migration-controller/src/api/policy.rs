//! The `HandoverPolicy` custom resource: how the handovers of some VMs are to be done.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which VMs a policy is for, and how their handovers are to be done.
///
/// Of the policies that select a VM one applies, as a whole: one that names namespaces and labels
/// before one that names labels, that before one that names namespaces, and that before one that
/// names neither; then the one that asks for more labels; then the first by name. What it leaves
/// out, and every VM that no policy selects, has the controller's own settings.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "segue.io",
    version = "v1alpha1",
    kind = "HandoverPolicy",
    plural = "handoverpolicies",
    shortname = "hop",
    category = "segue",
    derive = "PartialEq",
    doc = "How the network handovers of the selected VMs are to be done. None is needed: what no \
           policy says is the controller's own setting.",
    printcolumn(
        name = "Namespaces",
        type_ = "string",
        json_path = ".spec.namespaces",
        description = "The namespaces it is for; all where it names none"
    ),
    printcolumn(
        name = "Mode",
        type_ = "string",
        json_path = ".spec.routing.mode",
        description = "What makes traffic follow a guest"
    ),
    printcolumn(
        name = "Flip",
        type_ = "string",
        json_path = ".spec.routing.flip",
        description = "On which sign it does"
    ),
    printcolumn(
        name = "Keep egress",
        type_ = "integer",
        json_path = ".spec.routing.keepEgressSeconds",
        description = "For how many seconds traffic with the outside stays with the old gateway"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "How old it is"
    ),
    printcolumn(
        name = "Labels",
        type_ = "string",
        json_path = ".spec.vmSelector.matchLabels",
        description = "Labels that a VM must have",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
pub struct HandoverPolicySpec {
    /// The namespaces of the VMs; all of them where none is named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 256),
        inner(length(min = 1, max = 63)),
        extend("x-kubernetes-list-type" = "set")
    )]
    pub namespaces: Vec<String>,
    /// What labels the VirtualMachineInstances must have; any where this is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_selector: Option<VmSelector>,
    /// How routes that depend on a guest's place follow it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<Routing>,
    /// How long to wait for what may never come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadlines: Option<PolicyDeadlines>,
    /// Whether a migration waits for its network, where the nodes' agents are asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<PolicyGate>,
}

/// A label selector as Kubernetes has it: every label and every expression must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmSelector {
    /// Labels with their values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub match_labels: BTreeMap<String, String>,
    /// What is to be true of labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub match_expressions: Vec<LabelExpression>,
}

/// What is to be true of one label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0 \
             : !has(self.values) || size(self.values) == 0",
    "message": "In and NotIn need values, Exists and DoesNotExist take none",
}]))]
pub struct LabelExpression {
    /// The label.
    #[schemars(length(min = 1, max = 317))]
    pub key: String,
    /// How it relates to the values.
    pub operator: LabelOperator,
    /// The values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 63)))]
    pub values: Vec<String>,
}

/// How a label relates to values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LabelOperator {
    /// It has one of them.
    In,
    /// It has none of them, or is absent.
    NotIn,
    /// It is there.
    Exists,
    /// It is absent.
    DoesNotExist,
}

/// How routes that depend on a guest's place follow it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "!has(self.keepEgressSeconds) || self.keepEgressSeconds == 0 || !has(self.mode) \
                 || self.mode == 'AddressSets'",
        "message": "only AddressSets can keep egress: a static route leads to one node at a time",
    },
    {
        "rule": "!has(self.keepEgressSeconds) || self.keepEgressSeconds == 0 || !has(self.flip) \
                 || self.flip == 'OnResume'",
        "message": "egress that is kept cannot flip on the pause",
    },
]))]
pub struct Routing {
    /// What makes traffic follow the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<RoutingMode>,
    /// On which sign it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flip: Option<FlipOn>,
    /// For how many seconds after the guest resumed its traffic with the outside stays with the
    /// gateway that it had, so that connections which that gateway translates live on; 0 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 86_400))]
    pub keep_egress_seconds: Option<i64>,
}

/// What makes traffic follow a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RoutingMode {
    /// Its addresses move from one node's address set to another's; northd computes nothing anew.
    #[default]
    AddressSets,
    /// The cluster router's static routes to its addresses get another output port, for layouts
    /// that others own. northd computes for seconds in a large network.
    StaticRoutes,
}

/// On which sign routes follow a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FlipOn {
    /// When it runs on the target.
    #[default]
    OnResume,
    /// When it pauses on the source, ahead of its resuming on the target. Needs an agent on the
    /// source: no API tells of the pause.
    OnPause,
}

/// How long to wait for what may never come, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyDeadlines {
    /// For chassis other than source and target to follow, before the port is ready without them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 86_400))]
    pub peers_seconds: Option<f64>,
    /// For the source to give the port up after a success, before the target becomes its only place
    /// all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 86_400))]
    pub release_seconds: Option<f64>,
    /// For the port to be bound where the guest runs, before the handover is called Failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 86_400))]
    pub establish_seconds: Option<f64>,
}

/// How long a migration waits for its network before anything is copied, and what then.
///
/// Needs KubeVirt's node hooks, with the agent as the hook `PreMigrationSource`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyGate {
    /// For how many seconds. virt-handler itself gives a hook 30 where its Plugin says nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 25))]
    pub deadline_seconds: Option<i64>,
    /// What then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<GateTimeout>,
}

/// What becomes of a migration whose network is not ready in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum GateTimeout {
    /// It goes, and an Event says that its network was not ready.
    #[default]
    Ignore,
    /// It is refused, and nothing is copied. virt-handler asks again until its network is ready, or
    /// somebody deletes the migration: KubeVirt does not fail it for that.
    Fail,
}
