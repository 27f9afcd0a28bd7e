//! What the kernel says of a process.

use std::fs;

/// What proc(5) says of a process from its state on, in /proc/PID/stat: that stands behind the name, which may hold anything. The state is its third column. `None` where there is
/// no such process.
pub fn process_stat(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(") ")?.1.to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn stat_begins_behind_a_name_that_looks_like_more() {
        let script = "printf ') Z 1 (x) ' > /proc/self/comm; echo; read line";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It has its name when it says something.
        let mut byte = [0];
        std::io::Read::read_exact(&mut child.stdout.take().unwrap(), &mut byte).unwrap();
        let stat = process_stat(child.id()).unwrap();
        let parent = stat.split(' ').nth(1).unwrap();
        assert_eq!(parent, std::process::id().to_string(), "{stat}");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(process_stat(child.id()), None);
    }
}
