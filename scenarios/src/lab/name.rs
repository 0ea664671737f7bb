//! Names of labs and of what belongs to them.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// Where labs keep their state; one directory and one lock file per lab.
const STATE_ROOT: &str = "/run/segue";

/// A lab's name: a lower-case letter followed by at most 11 lower-case letters or digits.
///
/// Everything a lab creates outside its own processes carries this name, and the sweep of leftovers goes by it alone.
/// A dash is not allowed in it, so no lab's names can be a prefix of another's.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// The prefix of this lab's network namespaces.
    pub fn netns_prefix(&self) -> String {
        format!("segue-{}-", self.0)
    }

    /// The network namespace of one host, as `ip netns` knows it.
    pub fn netns(&self, host: &str) -> String {
        format!("{}{host}", self.netns_prefix())
    }

    /// Directory of the lab's state and logs, removed when the lab goes down.
    pub fn state_dir(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(&self.0)
    }

    /// The file whose `flock` is held while a process brings up, runs or takes down this lab.
    ///
    /// It is outside the state directory, because removing a locked file lets two processes hold "the" lock.
    pub fn lock_path(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(format!("{}.lock", self.0))
    }

    /// The bare name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for LabName {
    fn default() -> Self {
        Self("lab".to_owned())
    }
}

impl FromStr for LabName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let fits = text.len() <= 12
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if !fits {
            bail!(
                "lab name {text:?}: use a lower-case letter and then at most 11 lower-case letters or digits"
            );
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for LabName {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> Self {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_mistaken_for_another_labs_are_refused() {
        for bad in ["", "a-b", "Lab", "1lab", "a.b", "a/b", "thirteenchars", "ü"] {
            assert!(bad.parse::<LabName>().is_err(), "{bad:?} was accepted");
        }
        for good in ["lab", "t1", "twelvechars1"] {
            assert_eq!(good.parse::<LabName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn no_labs_namespace_prefix_matches_another_labs_namespace() {
        let (short, long): (LabName, LabName) = ("lab".parse().unwrap(), "lab2".parse().unwrap());
        assert!(!long.netns("node1").starts_with(&short.netns_prefix()));
    }
}
