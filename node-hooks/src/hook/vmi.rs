//! The VirtualMachineInstance that virt-handler sends, as far as it matters.

use serde::Deserialize;
use thiserror::Error;

use crate::core::Instance;

/// The longest name or UID that is taken.
const LONGEST: usize = 512;

/// What is wrong with what was sent.
#[derive(Debug, Error)]
pub(super) enum VmiError {
    #[error("the VirtualMachineInstance is not the JSON of one: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the VirtualMachineInstance has no {0}")]
    Missing(&'static str),
    #[error("the VirtualMachineInstance has a {0} of more than {LONGEST} bytes")]
    Long(&'static str),
}

#[derive(Deserialize)]
struct Vmi {
    metadata: Metadata,
    #[serde(default)]
    status: Option<VmiStatus>,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    uid: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct VmiStatus {
    #[serde(default)]
    migration_state: Option<MigrationState>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MigrationState {
    #[serde(default)]
    migration_uid: Option<String>,
}

/// Which VM, and which of its migrations.
pub(super) fn read(json: &[u8]) -> Result<Instance, VmiError> {
    let vmi: Vmi = serde_json::from_slice(json)?;
    let migration_state = vmi.status.and_then(|status| status.migration_state);
    let migration_uid = migration_state.and_then(|state| state.migration_uid);
    let Metadata {
        namespace,
        name,
        uid,
    } = vmi.metadata;
    let migration_uid = migration_uid.unwrap_or_default();
    for (what, text) in [
        ("metadata.namespace", &namespace),
        ("metadata.name", &name),
        ("metadata.uid", &uid),
    ] {
        if text.is_empty() {
            return Err(VmiError::Missing(what));
        }
        if text.len() > LONGEST {
            return Err(VmiError::Long(what));
        }
    }
    if migration_uid.len() > LONGEST {
        return Err(VmiError::Long("status.migrationState.migrationUid"));
    }
    Ok(Instance {
        namespace,
        name,
        uid,
        migration_uid,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_migrating_instance_names_its_migration() {
        let json = br#"{"apiVersion":"kubevirt.io/v1","kind":"VirtualMachineInstance",
            "metadata":{"namespace":"demo","name":"web","uid":"u-1","labels":{"a":"b"}},
            "spec":{"domain":{}},
            "status":{"nodeName":"n1","migrationState":{"migrationUid":"m-1","sourceNode":"n1"}}}"#;
        let instance = Instance {
            namespace: "demo".into(),
            name: "web".into(),
            uid: "u-1".into(),
            migration_uid: "m-1".into(),
        };
        assert_eq!(read(json).unwrap(), instance);
    }

    #[rstest::rstest]
    #[case("{}")]
    #[case(r#"{"migrationState":null}"#)]
    #[case(r#"{"migrationState":{}}"#)]
    fn one_without_a_migration_is_taken(#[case] status: &str) {
        let metadata = r#"{"namespace":"demo","name":"web","uid":"u-1"}"#;
        let json = format!(r#"{{"metadata":{metadata},"status":{status}}}"#);
        assert_eq!(read(json.as_bytes()).unwrap().migration_uid, "");
        let json = format!(r#"{{"metadata":{metadata}}}"#);
        assert_eq!(read(json.as_bytes()).unwrap().name, "web");
    }

    #[rstest::rstest]
    #[case("", "JSON")]
    #[case("[]", "JSON")]
    #[case("{}", "metadata")]
    #[case(r#"{"metadata":{"namespace":5}}"#, "JSON")]
    #[case(r#"{"metadata":{"name":"web","uid":"u"}}"#, "metadata.namespace")]
    #[case(r#"{"metadata":{"namespace":"demo","uid":"u"}}"#, "metadata.name")]
    #[case(r#"{"metadata":{"namespace":"demo","name":"web"}}"#, "metadata.uid")]
    fn what_is_wrong_is_named(#[case] json: &str, #[case] named: &str) {
        let error = read(json.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }

    #[test]
    fn absurd_names_are_refused() {
        let long = "x".repeat(LONGEST + 1);
        let json = format!(r#"{{"metadata":{{"namespace":"demo","name":"{long}","uid":"u"}}}}"#);
        assert!(matches!(
            read(json.as_bytes()),
            Err(VmiError::Long("metadata.name"))
        ));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes: Vec<u8>, depth in 0usize..2000) {
            let _ = read(&bytes);
            let deep = "[".repeat(depth);
            let _ = read(format!(r#"{{"metadata":{deep}"#).as_bytes());
        }
    }
}
