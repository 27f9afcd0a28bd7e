//! Disks seen from the guest: a front end that behaves, one that starts over, and hostile ones.

mod attend;
mod disk;
mod handover;
mod hostile;
mod life;
mod requests;

use std::sync::{Arc, Mutex};

use hospes_image::Image;
use hospes_ring::FrontRing;
use hospes_units::{Gfn, GrantRef};
use hospes_xen_abi::blkif;
use zerocopy::FromZeros;

use super::Block;
use crate::frame::{Bus, DeviceId, DeviceNodes, Kind, RingPages};
use crate::lock;
use crate::testing::{Guest, wait};

use disk::MemoryImage;

const ID: DeviceId = DeviceId {
    kind: Kind::Vbd,
    devid: 51712,
};

type Ring = FrontRing<RingPages, blkif::Request, blkif::Response>;

/// One queue of the front end.
struct FrontQueue {
    ring: Ring,
    port: u32,
    grefs: Vec<GrantRef>,
}

/// A guest with a disk.
struct Machine {
    guest: Guest,
    bus: Bus,
    image: Arc<MemoryImage>,
    queues: Vec<FrontQueue>,
}

impl Machine {
    /// Not connected yet.
    fn new(image: MemoryImage) -> Machine {
        let guest = Guest::new();
        let bus = guest.bus();
        let image = Arc::new(image);
        let machine = Machine {
            guest,
            bus,
            image,
            queues: Vec::new(),
        };
        machine.attach();
        machine
    }

    fn attach(&self) {
        let log = Arc::clone(&self.guest.log);
        let log = Arc::new(move |line: &str| lock(&log).push(line.to_owned()));
        let block = Block::new(Arc::clone(&self.image) as Arc<dyn Image>, false, 2, log);
        let nodes = DeviceNodes::default();
        self.bus.attach(ID, &nodes, Box::new(block)).unwrap();
    }

    fn connected(image: MemoryImage) -> Machine {
        let mut machine = Machine::new(image);
        machine.connect(1, 0);
        machine
    }

    /// What a driver does until both halves are connected.
    fn connect(&mut self, queues: usize, order: u32) {
        self.offer(queues, order);
        self.guest.wait_state(ID, "4");
        self.guest.write(ID, "state", 4);
    }

    /// Writes the nodes of the front end, and Initialised.
    fn offer(&mut self, queues: usize, order: u32) {
        let guest = &self.guest;
        self.queues.clear();
        if queues > 1 {
            guest.write(ID, "multi-queue-num-queues", queues);
        }
        if order > 0 {
            guest.write(ID, "ring-page-order", order);
        }
        guest.write(ID, "protocol", "x86_64-abi");
        for number in 0..queues {
            let directory = if queues > 1 {
                format!("queue-{number}/")
            } else {
                String::new()
            };
            let (ring, grefs) = guest.ring(1 << order);
            let port = guest.port();
            for (i, gref) in grefs.iter().enumerate() {
                let index = if order > 0 {
                    i.to_string()
                } else {
                    String::new()
                };
                guest.write(ID, &format!("{directory}ring-ref{index}"), gref);
            }
            guest.write(ID, &format!("{directory}event-channel"), port);
            self.queues.push(FrontQueue { ring, port, grefs });
        }
        guest.write(ID, "state", 3);
    }

    /// Queues requests and notifies as a driver does.
    fn send(&mut self, queue: usize, requests: &[blkif::Request]) {
        let queue = &mut self.queues[queue];
        for request in requests {
            assert!(queue.ring.put(request));
        }
        if queue.ring.publish() {
            self.guest.send(queue.port);
        }
    }

    /// The next response.
    fn receive(&mut self, queue: usize) -> blkif::Response {
        let ring = &mut self.queues[queue].ring;
        let mut response = None;
        wait("a response", || {
            response = ring.take();
            response.is_some()
        });
        response.unwrap()
    }

    /// One request and its answer.
    fn ask(&mut self, request: blkif::Request) -> blkif::Response {
        self.send(0, &[request]);
        let response = self.receive(0);
        assert_eq!(response.id, request.id);
        response
    }

    /// A page of the guest with this content, and a grant of it.
    fn page(&self, fill: u8) -> (Gfn, GrantRef) {
        let gfn = self.guest.page();
        let memory = self.guest.xen.memory();
        memory.write(gfn.gpa(), &[fill; 4096]).unwrap();
        (gfn, self.guest.grant(gfn, 0))
    }

    fn content(&self, gfn: Gfn) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let memory = self.guest.xen.memory();
        memory.read(gfn.gpa(), &mut bytes).unwrap();
        bytes
    }
}

fn segment(gref: GrantRef, first_sect: u8, last_sect: u8) -> blkif::Segment {
    blkif::Segment {
        gref: gref.0,
        first_sect,
        last_sect,
        pad: 0,
    }
}

fn request(operation: u8, sector_number: u64, segments: &[blkif::Segment]) -> blkif::Request {
    static NEXT: Mutex<u64> = Mutex::new(0);
    let mut request = blkif::Request::new_zeroed();
    request.operation = operation;
    request.nr_segments = segments.len() as u8;
    request.sector_number = sector_number;
    request.segments[..segments.len()].copy_from_slice(segments);
    let mut next = lock(&NEXT);
    *next += 1;
    request.id = *next;
    request
}
