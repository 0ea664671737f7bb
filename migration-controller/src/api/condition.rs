use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Moment;

/// What a [`Condition`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ConditionType {
    /// The VM's interfaces are of a kind that keeps its addresses and connections across nodes.
    Compatible,
    /// The target is ready to take the guest's traffic.
    Prepared,
    /// The handover is over and nothing is left to do.
    Complete,
    /// Something keeps the handover from acting, and a person should look.
    Degraded,
}

/// Kubernetes' three-valued truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// Nobody can tell.
    Unknown,
}

/// A condition in the shape of `metav1.Condition`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub type_: ConditionType,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// When `status` last changed.
    pub last_transition_time: Moment,
    /// Why, for programs: one word in CamelCase.
    pub reason: String,
    /// Why, for people.
    pub message: String,
    /// The generation of the object that the condition was found on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

impl Condition {
    /// Puts a condition in its place in `conditions`. The transition time moves only when the
    /// status does.
    pub fn set(
        conditions: &mut Vec<Self>,
        type_: ConditionType,
        status: ConditionStatus,
        reason: &str,
        message: impl Into<String>,
        now: Moment,
    ) {
        let mut condition = Self {
            type_,
            status,
            last_transition_time: now,
            reason: reason.to_owned(),
            message: message.into(),
            observed_generation: None,
        };
        match conditions.iter_mut().find(|known| known.type_ == type_) {
            Some(known) => {
                if known.status == status {
                    condition.last_transition_time = known.last_transition_time;
                }
                *known = condition;
            }
            None => conditions.push(condition),
        }
    }

    /// The condition of a type, if there is one.
    pub fn find(conditions: &[Self], type_: ConditionType) -> Option<&Self> {
        conditions.iter().find(|known| known.type_ == type_)
    }
}
