//! Where etcd, kube-apiserver and kubectl are.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use super::Error;

const PROGRAMS: [&str; 3] = ["etcd", "kube-apiserver", "kubectl"];

/// A directory that holds etcd, kube-apiserver and kubectl.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assets(PathBuf);

impl Assets {
    /// The directory in `KUBEBUILDER_ASSETS`, as operator projects have it in their CI; without it, what
    /// `tools/kubernetes/build.sh` has built. Builds nothing.
    ///
    /// # Errors
    /// [`Error::Assets`] with the remedy when there is neither.
    pub fn find() -> Result<Self, Error> {
        match std::env::var_os("KUBEBUILDER_ASSETS").filter(|value| !value.is_empty()) {
            Some(directory) => Self::in_directory(directory),
            None => Self::built(),
        }
    }

    /// The three programs in `directory`.
    ///
    /// # Errors
    /// [`Error::Assets`] when one of them is missing.
    pub fn in_directory(directory: impl AsRef<OsStr>) -> Result<Self, Error> {
        let directory = PathBuf::from(directory.as_ref());
        let missing: Vec<_> = PROGRAMS
            .into_iter()
            .filter(|program| !directory.join(program).is_file())
            .collect();
        if missing.is_empty() {
            return Ok(Self(directory));
        }
        let reason = format!(
            "{} has no {}; point KUBEBUILDER_ASSETS to a directory with {}, or unset it and run `make tools`",
            directory.display(),
            missing.join(", "),
            PROGRAMS.join(", "),
        );
        Err(Error::Assets { reason })
    }

    /// Where the build script puts what it builds is its own business: it is asked.
    fn built() -> Result<Self, Error> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/kubernetes/build.sh");
        let output = Command::new(&script)
            .arg("--if-built")
            .output()
            .map_err(|source| Error::Spawn {
                program: script,
                source,
            })?;
        if output.status.success() {
            return Self::in_directory(String::from_utf8_lossy(&output.stdout).trim_end());
        }
        Err(Error::Assets {
            reason: String::from_utf8_lossy(&output.stderr)
                .trim_end()
                .to_owned(),
        })
    }

    /// The path of one of the programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_the_programs_is_refused_with_their_names_and_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("etcd"), "").unwrap();
        let error = Assets::in_directory(directory.path())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("has no kube-apiserver, kubectl;") && error.contains("make tools"),
            "{error}"
        );
    }
}
