//! What a machine process writes to its standard error, which goes to the domain's log.
//!
//! It has no descriptor of the log itself: it could empty it, or fill the disk by it.

use std::io::{self, BufRead, BufReader, PipeReader, Read, Write};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use super::told;
use crate::log::log;

/// Most bytes of one life of the domain.
const LIFE_MAX: u64 = 4 << 20;
/// Most bytes that are taken for one line.
const LINE_MAX: u64 = 4 << 10;

/// Gives a process a standard error that is passed on to this process's own, in a thread that ends when nobody has it open any more.
pub(super) fn pass_on(command: &mut Command) -> io::Result<JoinHandle<()>> {
    let (reader, writer) = io::pipe()?;
    command.stderr(Stdio::from(writer));
    thread::Builder::new()
        .name("log".into())
        .spawn(move || copy(reader, io::stderr()))
}

fn copy(from: PipeReader, mut to: impl Write) {
    let mut from = BufReader::new(from);
    let mut left = LIFE_MAX;
    let mut line = Vec::new();
    while let Ok(1..) = (&mut from).take(LINE_MAX).read_until(b'\n', &mut line) {
        let text = String::from_utf8_lossy(&line);
        let text = format!("{}\n", told::lines(text.trim_end_matches('\n')));
        match left.checked_sub(text.len() as u64) {
            Some(less) => {
                left = less;
                // As for all lines of the log.
                let _ = to.write_all(text.as_bytes());
            }
            None if left > 0 => {
                left = 0;
                log!(
                    "The machine process has written {LIFE_MAX} bytes: nothing more of it is logged"
                );
            }
            None => {}
        }
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_plain_and_end_sometime() {
        let (reader, mut writer) = io::pipe().unwrap();
        let copying = thread::spawn(move || {
            let mut log = Vec::new();
            copy(reader, &mut log);
            log
        });
        writer.write_all(b"one\n\x1b[2Jtwo\n").unwrap();
        let long = [b'x'; 100 << 10];
        for _ in 0..2 * LIFE_MAX / long.len() as u64 {
            writer.write_all(&long).unwrap();
            writer.write_all(&[b'\n'; 10 << 10]).unwrap();
        }
        drop(writer);
        let log = copying.join().unwrap();
        assert!(log.starts_with("one\n\u{fffd}[2Jtwo\n".as_bytes()));
        assert!(log.len() as u64 <= LIFE_MAX, "{}", log.len());
    }

    #[test]
    fn a_process_does_not_have_the_log_itself() {
        let mut command = Command::new("sh");
        command.args(["-c", "test -p /proc/self/fd/2"]);
        let passing = pass_on(&mut command).unwrap();
        let status = command.status().unwrap();
        drop(command);
        assert!(status.success(), "{status}");
        passing.join().unwrap();
    }
}
