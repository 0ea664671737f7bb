//! How long work tells what it is doing.

use std::{
    io::{IsTerminal, stderr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Receives the steps of long work. A step ends when the next begins, or when the receiver is dropped.
pub trait Progress: Send + Sync {
    /// A new step begins.
    fn step(&self, what: &str);

    /// Something to show within the current step, such as a line of a tool's output.
    fn detail(&self, line: &str);
}

/// Says nothing.
#[derive(Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn step(&self, _: &str) {}

    fn detail(&self, _: &str) {}
}

/// Writes to standard error: a spinner with the current step on a terminal, one line per step elsewhere.
#[derive(Debug, Default)]
pub struct Terminal {
    current: Mutex<Option<Step>>,
}

#[derive(Debug)]
struct Step {
    what: String,
    since: Instant,
    /// Absent where standard error is not a terminal.
    bar: Option<ProgressBar>,
}

// === impl Terminal ===

impl Progress for Terminal {
    fn step(&self, what: &str) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // Finish the previous line before the new spinner draws.
        drop(current.take());
        *current = Some(Step::begin(what));
    }

    fn detail(&self, line: &str) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Step {
            what,
            bar: Some(bar),
            ..
        }) = &*current
        {
            bar.set_message(format!("{what}: {line}"));
        }
    }
}

// === impl Step ===

impl Step {
    fn begin(what: &str) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_message(what.to_owned());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            eprintln!("{what}");
        }
        Self {
            what: what.to_owned(),
            since: Instant::now(),
            bar,
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            eprintln!(
                "{} ({:.1} s)",
                self.what,
                self.since.elapsed().as_secs_f64()
            );
        }
    }
}
