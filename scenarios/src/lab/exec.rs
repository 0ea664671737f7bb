//! Running commands and reading their answer.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};

/// No command of the lab takes longer, unless it hangs: the slowest (a database or a daemon starting) take a second.
const DEADLINE: Duration = Duration::from_mins(1);

/// Runs a command to its end and returns what it wrote to standard output, without the final line break.
///
/// # Errors
/// When it cannot be started, fails (the message carries its standard error) or takes more than a minute; then it is
/// killed, as it is when the future is dropped.
pub async fn output(command: Command) -> Result<String> {
    output_within(command, DEADLINE).await
}

/// As [`output`], with a deadline of one's own.
pub async fn output_within(command: Command, deadline: Duration) -> Result<String> {
    let shown = shown(&command);
    let mut command = tokio::process::Command::from(command);
    command
        .kill_on_drop(true)
        .stdin(std::process::Stdio::null());
    let output = tokio::time::timeout(deadline, command.output())
        .await
        .with_context(|| format!("`{shown}` did not end within {} s", deadline.as_secs()))?
        .with_context(|| format!("cannot start `{shown}`"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{shown}` failed ({}): {}", output.status, stderr.trim());
    }
    let stdout = String::from_utf8(output.stdout)
        .with_context(|| format!("`{shown}` wrote something not UTF-8"))?;
    Ok(stdout.trim_end().to_owned())
}

/// The command as a person would type it; what comes before `--` in an entry into a host is left out.
pub(crate) fn shown(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect();
    let entry = words
        .get(1)
        .is_some_and(|word| word == super::node::EXEC_VERB);
    let start = if entry {
        words
            .iter()
            .position(|word| word == "--")
            .map_or(0, |at| at + 1)
    } else {
        0
    };
    words.get(start..).unwrap_or_default().join(" ")
}

/// A command with its arguments.
pub(crate) fn command<I, S>(program: &str, args: I) -> Command
where
    I: IntoIterator<Item = S>,
    S: AsRef<std::ffi::OsStr>,
{
    let mut command = Command::new(program);
    command.args(args);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_tells_the_command_and_what_it_complained_of() {
        let error = output(command("sh", ["-c", "echo no such port >&2; exit 3"]))
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("sh -c") && error.contains("no such port") && error.contains('3'),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let error = format!(
            "{:#}",
            output(command("/nonexistent/tool", ["x"]))
                .await
                .unwrap_err()
        );
        assert!(error.contains("/nonexistent/tool"), "{error}");
    }
}
