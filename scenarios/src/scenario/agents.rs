//! What happens to the agents on the nodes.

use serde::Deserialize;

use super::Moment;

/// How the gate is to be that holds migrations until their network is ready, where not as shipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hook {
    /// For how many seconds an agent waits for the controller's word (`--hook-deadline`).
    pub deadline_seconds: Option<u16>,
    /// What an agent makes of a controller that says nothing in that time (`--hook-on-timeout`).
    pub on_timeout: OnTimeout,
    /// What virt-handler makes of a refusal (`failureStrategy` of the `Plugin`).
    pub failure_strategy: FailureStrategy,
}

/// What an agent makes of a controller that does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// The migration goes.
    #[default]
    Ignore,
    /// The migration is refused.
    Fail,
}

/// What virt-handler makes of a refusal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum FailureStrategy {
    /// It copies all the same.
    #[default]
    Ignore,
    /// It does not copy, and asks again after a while.
    Fail,
}

/// Something that is done to the agent of a node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentFault {
    /// The node.
    pub node: String,
    /// What.
    #[serde(rename = "do")]
    pub what: AgentFaultKind,
    /// When; an agent that is absent is so from before the migration.
    #[serde(default)]
    pub at: Option<Moment>,
    /// When that is over and the agent runs again.
    #[serde(default = "defaults::again_at")]
    pub again_at: Moment,
}

/// What is done to an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentFaultKind {
    /// It is killed (SIGKILL).
    Kill,
    /// It stands still (SIGSTOP).
    Freeze,
    /// It was never started.
    Absent,
    /// Every packet between it and the controller is dropped; neither is told.
    Cut,
}

mod defaults {
    use super::Moment;

    pub(super) fn again_at() -> Moment {
        Moment::Ended
    }
}
