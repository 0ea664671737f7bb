//! Commands for a guest's shell, over a serial port that QEMU offers as a socket.
//!
//! A command is a line: a word made up for it, and what the shell is to do. The answer stands between the lines
//! `<word> begin` and `<word> end <status>`; what is outside of them is left over from a command that was given up.

use std::{io, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};
use uuid::Uuid;

/// For a guest that hangs: it ends a command that hangs after 30 s (`guest-init.sh`).
const DEADLINE: Duration = Duration::from_secs(40);

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    /// What it wrote to standard output and standard error, without the final line break.
    text: String,
    /// What it returned; 0 is success.
    status: u8,
}

/// Runs a command and returns what it wrote.
///
/// # Errors
/// When nobody listens at the socket, the command fails (the message carries what it wrote), or there is no answer
/// within 40 s.
pub(super) async fn run(socket: &Path, command: &str) -> Result<String> {
    ensure!(
        !command.contains('\n'),
        "`{command}`: a command is one line"
    );
    let answer = tokio::time::timeout(DEADLINE, ask(socket, command))
        .await
        .with_context(|| format!("`{command}` did not end within {} s", DEADLINE.as_secs()))??;
    ensure!(
        answer.status == 0,
        "`{command}` failed ({}): {}",
        answer.status,
        answer.text
    );
    Ok(answer.text)
}

async fn ask(socket: &Path, command: &str) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket)
        .await
        .with_context(|| format!("{}: is the guest here?", socket.display()))?;
    let word = Uuid::new_v4().simple().to_string();
    stream
        .write_all(format!("{word} {command}\n").as_bytes())
        .await
        .context("the guest's serial port")?;
    read_answer(BufReader::new(stream), &word).await
}

async fn read_answer(mut from: impl AsyncBufRead + Unpin, word: &str) -> Result<Answer> {
    let (begin, end) = (format!("{word} begin"), format!("{word} end "));
    let mut answer: Option<String> = None;
    loop {
        let line = next_line(&mut from)
            .await
            .context("the guest's serial port")?;
        let Some(line) = line else {
            bail!("the guest went away before it answered");
        };
        if let Some(status) = line.strip_prefix(&end) {
            return Ok(Answer {
                text: answer.unwrap_or_default().trim_end().to_owned(),
                status: status.parse().context("the command's status")?,
            });
        }
        match &mut answer {
            Some(text) => {
                text.push_str(&line);
                text.push('\n');
            }
            None if line == begin => answer = Some(String::new()),
            None => {}
        }
    }
}

/// A line without its end; what is not UTF-8 is replaced.
async fn next_line(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    if from.read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    Ok(Some(String::from_utf8_lossy(&line).trim_end().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_is_told_from_what_is_left_over() {
        let said = "old end 0\nhalf a line\nw begin\none\n\ntwo\nw end 0\n";
        let answer = read_answer(said.as_bytes(), "w").await.unwrap();
        assert_eq!(answer.text, "one\n\ntwo");
        assert_eq!(answer.status, 0);
    }

    #[tokio::test]
    async fn a_failure_keeps_what_was_written() {
        let answer = read_answer("w begin\nno route\nw end 2\n".as_bytes(), "w").await;
        let wanted = Answer {
            text: "no route".to_owned(),
            status: 2,
        };
        assert_eq!(answer.unwrap(), wanted);
    }

    #[tokio::test]
    async fn a_guest_that_goes_away_is_an_error() {
        let error = read_answer("w begin\nhalf".as_bytes(), "w").await;
        assert!(error.unwrap_err().to_string().contains("went away"));
    }
}
